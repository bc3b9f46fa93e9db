"""A reward model: a tiny Llama with a head of one score, trained on pairs of answers with the Bradley-Terry loss.

    pip install transformers
    python examples/reward_model.py
    python examples/reward_model.py --quick     # a few steps, which learn nothing yet

The data is made here. A prompt is one word that names a topic, and each topic has WORDS words of its own. Of the two
answers to a prompt the better one has more words on the topic. So the model has to compare an answer with its prompt.
Answers have different lengths and are padded on the right. The score stands at the last token of each answer, and
``reward_scores`` multiplies that row by the head alone.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaModel

import rlkernels as rlk

TOPICS, WORDS, LENGTH, PAIRS = 4, 4, 8, 128
VOCAB = 1 + TOPICS + TOPICS * WORDS  # the padding, a name for each topic, the words


def answers(topic, on_topic, draw):
    """Draws answers of 5 to LENGTH words, of which ``on_topic`` are on the topic; returns tokens and their mask."""
    count = len(topic)
    lengths = torch.randint(5, LENGTH + 1, (count, 1), generator=draw)
    other = (topic[:, None] + torch.randint(1, TOPICS, (count, LENGTH), generator=draw)) % TOPICS
    place = torch.rand(count, LENGTH, generator=draw).masked_fill(torch.arange(LENGTH) >= lengths, 2.0)
    topics = torch.where(place.argsort(1).argsort(1) < on_topic[:, None], topic[:, None], other)
    words = 1 + TOPICS + topics * WORDS + torch.randint(WORDS, (count, LENGTH), generator=draw)
    tokens = torch.cat([1 + topic[:, None], words], 1)
    mask = torch.arange(LENGTH + 1) <= lengths
    return tokens.masked_fill(~mask, 0), mask


def pairs(count, draw):
    """Draws pairs of answers to the same prompts: the better ones, then the worse ones, and how far they are apart."""
    topic = torch.randint(TOPICS, (count,), generator=draw)
    worse = torch.randint(0, 4, (count,), generator=draw)
    better = worse + torch.randint(1, 3, (count,), generator=draw)
    tokens, masks = zip(answers(topic, better, draw), answers(topic, worse, draw), strict=True)
    return torch.cat(tokens), torch.cat(masks), better - worse


class RewardModel(torch.nn.Module):
    """A body of transformers, and a head that is a vector."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
        self.body, self.head = LlamaModel(config), torch.nn.Linear(48, 1, bias=False)

    def forward(self, tokens, mask):
        hidden = self.body(tokens, attention_mask=mask.long()).last_hidden_state
        return rlk.reward_scores(hidden, self.head.weight, attention_mask=mask)


def loss_of(model, batch):
    """Returns the loss of a batch of pairs, and its metrics."""
    tokens, mask, _ = batch
    chosen, rejected = model(tokens, mask).chunk(2)
    # The second term keeps the scores around 0, because the first one says only how far two scores are apart.
    return rlk.pairwise_reward_loss(chosen, rejected, center_coef=0.01, return_metrics=True)


def main(quick=False):
    torch.manual_seed(0)
    steps = 2 if quick else 200
    draw = torch.Generator().manual_seed(1)
    model, held_out = RewardModel(), pairs(500, torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    print("step  held-out loss  accuracy  margin of the scores")
    for step in range(steps + 1):
        if step % max(steps // 5, 1) == 0:
            with torch.no_grad():
                loss, metrics = loss_of(model, held_out)
            accuracy, margin = metrics["accuracy"].item(), metrics["reward_margin"].item()
            print(f"{step:4}  {loss.item():13.3f}  {accuracy:8.3f}  {margin:20.3f}")
        loss, _ = loss_of(model, pairs(PAIRS, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if quick:
        return
    if accuracy <= 0.9:
        sys.exit(f"not learned: a held-out accuracy of {accuracy:.3f}, expected more than 0.9")
    print(f"learned: the better answer has the higher score in {accuracy:.1%} of the held-out pairs")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
