"""GRPO with a verifiable reward: a tiny transformer learns to add, because a program checks its sums.

    python examples/grpo_arithmetic.py             # about 3 minutes on 2 cores
    python examples/grpo_arithmetic.py --quick     # a few steps, for a test

The task is the sum of two numbers of two digits: ``37+45=`` has the answer ``280``, the digits of 082 with the units
first, because a carry then moves in the order of writing. Of the 10,000 pairs 1,000 are held out of all training.

1. A supervised warm-up shows right answers, and stops while most sums are still wrong.
2. GRPO never shows an answer. The model samples GROUP answers per prompt at temperature 1, and a reward says which
   are right. ``group_advantages`` compares the answers to one prompt. ``linear_policy_loss`` makes the right ones more
   likely, from hidden states: no logits are held.
"""

import sys
import time

import torch
from torch import nn

import rlkernels as rlk

PLUS, EQUALS, VOCAB = 10, 11, 12  # a digit is its own token
PROMPT, ANSWER = 6, 3  # tokens of 37+45= and of 280
WIDTH, PROMPTS, GROUP = 64, 64, 8


def problems(left, right):
    """Writes sums as tokens: the prompts ``[N, PROMPT]``, and the right answers ``[N, ANSWER]``."""
    plus, equals = torch.full_like(left, PLUS), torch.full_like(left, EQUALS)
    prompts = torch.stack([left // 10, left % 10, plus, right // 10, right % 10, equals], 1)
    total = left + right
    return prompts, torch.stack([total % 10, total // 10 % 10, total // 100], 1)


class Model(nn.Module):
    """A causal transformer that returns hidden states. The losses take its head's weight themselves."""

    def __init__(self, layers=2, heads=4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(PROMPT + ANSWER, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, heads, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.layers(self.tokens(tokens) + self.places(torch.arange(length)), mask=causal, is_causal=True)

    @torch.no_grad()
    def answer(self, prompts, draw=None):
        """Samples answers at temperature 1 with the generator ``draw``, or takes the likeliest tokens without one."""
        tokens = prompts
        for _ in range(ANSWER):
            logits = self.head(self(tokens)[:, -1])
            following = logits.argmax(1, True) if draw is None else logits.softmax(1).multinomial(1, generator=draw)
            tokens = torch.cat([tokens, following], 1)
        return tokens[:, PROMPT:]


def answer_states(model, prompts, answers):
    """Returns the hidden states that predict the tokens of the answers: those one token earlier."""
    return model(torch.cat([prompts, answers], 1))[:, PROMPT - 1 : -1]


def reward_of(answers, right):
    """Checks each answer: 1.0 if all of its digits are right, else 0.0."""
    return (answers == right).all(1).float()


def step_of(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main(quick=False):
    torch.manual_seed(0)
    draw, began = torch.Generator().manual_seed(1), time.perf_counter()
    numbers = torch.arange(100)
    prompts, right = problems(*torch.cartesian_prod(numbers, numbers).unbind(1))
    order = torch.randperm(len(prompts), generator=draw)
    held_out, train = order[:1000], order[1000:]
    model = Model()

    def accuracy():
        return reward_of(model.answer(prompts[held_out]), right[held_out]).mean().item()

    def batch(count):
        return train[torch.randint(len(train), (count,), generator=draw)]

    print("phase    step  sampled reward  held-out accuracy  seconds")

    def report(phase, step, reward, score):
        print(f"{phase:7}  {step:4}  {reward:>14}  {score:17.3f}  {time.perf_counter() - began:7.0f}", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, (10 if quick else 5000) + 1):
        chosen = batch(256)
        hidden = answer_states(model, prompts[chosen], right[chosen])
        step_of(optimizer, rlk.linear_sft_loss(hidden, model.head.weight, right[chosen]))
        # The warm-up needs some right answers and no more, because GRPO learns from groups with right and wrong ones.
        if step % 25 == 0 and accuracy() > 0.2:
            break
    start = accuracy()
    report("warm-up", step, "", start)

    steps = 3 if quick else 700
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(1, steps + 1):
        chosen = batch(PROMPTS).repeat_interleave(GROUP)
        answers = model.answer(prompts[chosen], draw)
        rewards = reward_of(answers, right[chosen])
        groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
        advantages = rlk.group_advantages(rewards, groups, eps=1e-4)
        hidden = answer_states(model, prompts[chosen], answers)
        # One optimizer step per batch: None stands for the log-probabilities of the policy that has just sampled.
        step_of(optimizer, rlk.linear_policy_loss(hidden, model.head.weight, answers, None, advantages))
        if step % max(steps // 7, 1) == 0:
            report("GRPO", step, f"{rewards.mean().item():.3f}", score := accuracy())
    if quick:
        return
    if start >= 0.4 or score <= 0.8:
        sys.exit(f"not learned: from {start:.3f} to {score:.3f}, expected from below 0.4 to above 0.8")
    print(f"learned: held-out sums are right in {score:.1%}, after {start:.1%} before GRPO")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
