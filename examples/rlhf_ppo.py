"""RLHF with PPO: a reward model's score, less a KL to a reference, and a value head, on a tiny Llama.

    pip install transformers
    python examples/rlhf_ppo.py
    python examples/rlhf_ppo.py --quick     # a few steps, which learn nothing yet

1. Supervised fine-tuning. The model learns to write comments of random length, whose words are friendly, hostile or
   neutral with equal chances. A copy of it is the reference.
2. PPO. The score of a comment is the mean of its words, 1, -1 or 0, which stands for a reward model. The reward of a
   token is the KL penalty, and at the last token the score is added. GAE makes advantages of these, the clipped
   losses train policy and value head, and a controller moves the coefficient of the KL towards its target.

Without the KL the policy would end at one friendly word, again and again. With the KL the score rises, and the policy
stays near the reference.
"""

import copy
import sys

import torch
from transformers import LlamaConfig, LlamaModel

import rlkernels as rlk

START, END, WORDS, LENGTH, BATCH = 0, 1, 30, 12, 64
VOCAB = 2 + WORDS
MOOD = torch.zeros(VOCAB)
MOOD[2:12], MOOD[12:22] = 1.0, -1.0  # ten friendly words, ten hostile ones, and ten neutral ones


class Model(torch.nn.Module):
    """A body with two heads: one for the next token, and one for the value of the state."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
        )
        self.body = LlamaModel(config)
        self.head, self.value = torch.nn.Linear(48, VOCAB, bias=False), torch.nn.Linear(48, 1)
        torch.nn.init.zeros_(self.value.weight)

    def forward(self, tokens):
        """Returns the hidden state of each position, which scores the next token."""
        return self.body(tokens[:, :-1]).last_hidden_state

    def values(self, hidden):
        return rlk.reward_scores(hidden, self.value.weight, bias=self.value.bias, positions="all")


def scored(tokens):
    """Returns the targets of the positions, and the mask of those up to the first END."""
    targets = tokens[:, 1:]
    ends = (targets == END).long().cumsum(1)
    return targets, (ends == 0) | ((ends == 1) & (targets == END))


def comments(count):
    """Draws comments as people write them: each word is the last one with a chance of 1 in 8."""
    words = torch.randint(2, VOCAB, (count, LENGTH)).masked_fill(torch.rand(count, LENGTH) < 1 / 8, END)
    return torch.cat([torch.full((count, 1), START), words], 1)


@torch.no_grad()
def sample(model):
    tokens = torch.full((BATCH, 1), START)
    for _ in range(LENGTH):
        hidden = model.body(tokens).last_hidden_state[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(model.head(hidden).softmax(-1), 1)], 1)
    return tokens


@torch.no_grad()
def rollout(model, reference, controller):
    """Samples comments, and computes everything that the losses take as constants."""
    tokens = sample(model)
    targets, mask = scored(tokens)
    hidden = model(tokens)
    old = rlk.linear_token_logprobs(hidden, model.head.weight, targets)
    ref = rlk.linear_token_logprobs(reference(tokens), reference.head.weight, targets)
    scores = rlk.sequence_means(MOOD[targets], mask)
    rewards = rlk.assemble_rewards(
        scores, mask, placement="last-action", logprobs=old, ref_logprobs=ref, kl="k1", kl_coef=controller.coef
    )
    values = model.values(hidden)
    advantages, returns = rlk.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    kl = rlk.sequence_sums(old - ref, mask).mean()  # per comment, in nats
    controller.update(kl, n_steps=BATCH)
    return (tokens, mask, old, rlk.masked_whiten(advantages, mask), returns, values), scores.mean(), kl


def loss_of(model, tokens, mask, old, advantages, returns, old_values):
    hidden = model(tokens)
    logprobs = rlk.linear_token_logprobs(hidden, model.head.weight, tokens[:, 1:])
    policy = rlk.policy_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2)
    value = rlk.value_loss(model.values(hidden), old_values, returns, mask, clip_range=0.2)
    return policy + 0.5 * value


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main(quick=False):
    torch.manual_seed(0)
    warm_up, updates = (2, 2) if quick else (100, 50)
    n = max(updates // 5, 1)  # updates per line
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(warm_up):
        targets, mask = scored(tokens := comments(256))
        step(optimizer, rlk.linear_sft_loss(model(tokens), model.head.weight, targets, mask))
    reference = copy.deepcopy(model).requires_grad_(False)
    controller = rlk.KLController(0.05, kind="adaptive", target=4.0, horizon=1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scores, kls = [], []
    print("update   score  KL per comment  coefficient")
    for update in range(updates + 1):
        batch, score, kl = rollout(model, reference, controller)
        scores.append(score.item())
        kls.append(kl.item())
        if update % n == 0:
            print(f"{update:6}  {scores[-1]:6.3f}  {kls[-1]:14.3f}  {controller.coef.item():11.4f}")
        for _ in range(4):
            for part in torch.randperm(BATCH).split(BATCH // 2):
                step(optimizer, loss_of(model, *(x[part] for x in batch)))
    first, last, largest = scores[0], sum(scores[-n:]) / n, max(kls)
    print(f"score {first:.3f} -> {last:.3f}, mean of the last {n} updates; largest KL {largest:.2f} nats")
    if not quick and (last < first + 0.5 or largest > 8.0):
        sys.exit("not learned: expected a score 0.5 above the first one, and a KL of 8 nats at most")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
