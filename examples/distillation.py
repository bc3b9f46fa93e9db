"""Distillation from hidden states: a narrow student takes over the whole distributions of a wider teacher.

    python examples/distillation.py
    python examples/distillation.py --quick     # a short training, for a test

The language is made here: the next of VOCAB tokens depends on the two before it, and is drawn. A teacher learns it from
samples. Then a student of a quarter of its width learns from the teacher alone, by three divergences in turn. The two
heads are of different widths, and ``linear_distillation_loss`` never holds the logits of both models for a batch.

Agreement is the share of held-out tokens for which both models have the same likeliest next token.
"""

import sys

import torch
from torch import nn

import rlkernels as rlk

VOCAB, ROWS, LENGTH = 12, 128, 17


class Language:
    """A random language: every pair of tokens has a distribution of the next token."""

    def __init__(self, draw):
        self.following = (2.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=draw)).softmax(-1)

    def sample(self, rows, draw):
        tokens = torch.randint(VOCAB, (rows, LENGTH), generator=draw)
        for place in range(2, LENGTH):
            chances = self.following[tokens[:, place - 2], tokens[:, place - 1]]
            tokens[:, place] = chances.multinomial(1, generator=draw).squeeze(1)
        return tokens


class Model(nn.Module):
    """A model of the last two tokens, with two layers of ``width``, that returns hidden states."""

    def __init__(self, width):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.layers = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width), nn.SiLU(), nn.LayerNorm(width)
        )
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens):
        """Returns the states that predict tokens 2, 3, ... of each row."""
        inputs = self.tokens(tokens)
        return self.layers(torch.cat([inputs[:, :-2], inputs[:, 1:-1]], -1))


def train(model, steps, loss_of, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = loss_of(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def compare(student, teacher, tokens, kind):
    """Returns the divergence of the student from the teacher, and their agreement, on held-out tokens."""
    states, teacher_states = student(tokens), teacher(tokens)
    loss = rlk.linear_distillation_loss(states, student.head.weight, teacher_states, teacher.head.weight, kind=kind)
    same = student.head(states).argmax(-1) == teacher.head(teacher_states).argmax(-1)
    return loss.item(), same.float().mean().item()


def main(quick=False):
    torch.manual_seed(0)
    steps = 5 if quick else 200
    draw = torch.Generator().manual_seed(1)
    language = Language(draw)
    held_out = language.sample(256, draw)

    def batch():
        return language.sample(ROWS, draw)

    teacher = Model(width=96)

    def nll(tokens):
        return rlk.linear_sft_loss(teacher(tokens), teacher.head.weight, tokens[:, 2:])

    with torch.no_grad():
        before = nll(held_out).item()
    train(teacher, steps, nll, batch)
    teacher.requires_grad_(False)
    print(f"teacher: negative log-likelihood {before:.3f} -> {nll(held_out).item():.3f}")

    print("kind          divergence            agreement")
    failed = []
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        student = Model(width=24)

        def loss_of(tokens, student=student, kind=kind):
            return rlk.linear_distillation_loss(
                student(tokens), student.head.weight, teacher(tokens), teacher.head.weight, kind=kind
            )

        apart, agreed = compare(student, teacher, held_out, kind)
        train(student, steps, loss_of, batch)
        nearer, agrees = compare(student, teacher, held_out, kind)
        print(f"{kind:12}  {apart:.4f} -> {nearer:.4f}      {agreed:.3f} -> {agrees:.3f}", flush=True)
        if nearer > apart / 4 or agrees < 0.8:
            failed.append(kind)
    if quick:
        return
    if failed:
        sys.exit(f"not learned by {', '.join(failed)}: expected a quarter of the divergence and an agreement of 0.8")
    print("learned: every student is nearer to the teacher, and agrees with it on held-out tokens")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
