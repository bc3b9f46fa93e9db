"""A process reward model: a tiny transformer that judges each step of a solution, and so finds the right solution.

    python examples/process_reward_model.py
    python examples/process_reward_model.py --quick     # a short training, for a test

A solution is a start digit and STEPS steps. A step adds a digit modulo 10: ``7 +5 2 .`` is right, ``7 +5 3 .`` wrong.
Each step ends with the placeholder token, where its label stands: GOOD or BAD. All other tokens have the label -100.
``process_reward_loss`` reads the rows of logits at the placeholders alone, and there the columns of GOOD and BAD.

The test takes CHOICES solutions of each problem, of which exactly one has no wrong step. ``solution_scores`` gives each
solution a score, the product of the probabilities that its steps are good.
"""

import sys

import torch
from torch import nn

import rlkernels as rlk

ADD, END, GOOD, BAD, VOCAB = 10, 19, 20, 21, 22  # a digit is its own token; ADD + d - 1 says "add d", d from 1 to 9
STEPS, CHOICES, WIDTH, LENGTH = 4, 4, 64, 1 + 3 * 4


def problems(count, draw):
    """Draws the start digits and the digits to add: ``[count, 1 + STEPS]``."""
    start = torch.randint(10, (count, 1), generator=draw)
    return torch.cat([start, torch.randint(1, 10, (count, STEPS), generator=draw)], 1)


def solutions(digits, wrong, draw):
    """Writes solutions of problems as tokens ``[count, LENGTH]``, and the labels at the ends of their steps.

    ``wrong`` says for each step whether its result is wrong. The next step goes on from the wrong result.
    """
    at = digits[:, 0]
    tokens, labels = [at], [torch.full_like(at, -100)]
    for step in range(STEPS):
        added = digits[:, 1 + step]
        error = torch.randint(1, 10, at.shape, generator=draw)
        at = (at + added + error * wrong[:, step]) % 10
        tokens += [ADD + added - 1, at, torch.full_like(at, END)]
        labels += [labels[0], labels[0], torch.where(wrong[:, step], BAD, GOOD)]
    return torch.stack(tokens, 1), torch.stack(labels, 1)


def choices(count, draw):
    """Draws CHOICES solutions of each of ``count`` problems, and says which one of them has no wrong step."""
    wrong = torch.rand(count, CHOICES, STEPS, generator=draw) < 0.25
    # A wrong solution has at least one wrong step, because only one solution may be right.
    wrong.scatter_(2, torch.randint(STEPS, (count, CHOICES, 1), generator=draw), True)
    right = torch.randint(CHOICES, (count,), generator=draw)
    wrong[torch.arange(count), right] = False
    digits = problems(count, draw).repeat_interleave(CHOICES, 0)
    return *solutions(digits, wrong.flatten(0, 1), draw), right


class Model(nn.Module):
    """A causal transformer with logits over the vocabulary, in which GOOD and BAD are two tokens."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        inputs = self.tokens(tokens) + self.places(torch.arange(LENGTH))
        return self.head(self.layers(inputs, mask=causal, is_causal=True))


def loss_of(model, tokens, labels):
    """Returns the loss, with the share of steps that the model judges right, and the logits."""
    logits = model(tokens)
    loss, metrics = rlk.process_reward_loss(
        logits, labels, tokens, END, reward_token_ids=(GOOD, BAD), return_metrics=True
    )
    return loss, metrics["accuracy"].item(), logits


@torch.no_grad()
def evaluate(model, tokens, labels, right):
    """Returns the loss, the share of steps judged right, and the share of problems whose right solution scores best."""
    loss, accuracy, logits = loss_of(model, tokens, labels)
    good = logits[..., [GOOD, BAD]].softmax(-1)[..., 0]
    scores = rlk.solution_scores(good, tokens == END, kind="product")
    picked = (scores.view(-1, CHOICES).argmax(1) == right).float().mean().item()
    return loss.item(), accuracy, picked


def main(quick=False):
    torch.manual_seed(0)
    steps = 10 if quick else 600
    draw = torch.Generator().manual_seed(1)
    model, test = Model(), choices(500, torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    print(f"step  test loss  steps judged right  right one of {CHOICES} picked")
    for step in range(steps + 1):
        if step % (steps // 5) == 0:
            loss, accuracy, picked = evaluate(model, *test)
            print(f"{step:4}  {loss:9.3f}  {accuracy:18.3f}  {picked:21.3f}", flush=True)
        wrong = torch.rand(256, STEPS, generator=draw) < 0.5
        loss, _, _ = loss_of(model, *solutions(problems(256, draw), wrong, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if quick:
        return
    if picked < 0.8:
        sys.exit(f"not learned: the right solution was picked in {picked:.3f}, expected at least 0.8")
    print(f"learned: the right solution of {CHOICES} is picked in {picked:.1%} of the problems")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
