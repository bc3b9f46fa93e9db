"""An objective of your own in five lines: its check, its losses, and the report of a wrong derivative.

    python examples/custom_objective.py
    python examples/custom_objective.py --quick     # fewer steps, for a test

The objective is a smooth relative of PPO's clip: ``-A (1 + width tanh((rho - 1) / width))``, with ``rho`` the ratio.
Its gradient fades as the ratio leaves 1, and never stops at once. The function returns the value and its derivative
with respect to ``logp``; the library makes kernels of it for each backend.

The problem is a bandit with ACTIONS arms and one context per row. The right arm of a context has reward 1. Each batch
of samples serves EPOCHS steps, so that the ratios leave 1 and the objective matters.
"""

import sys

import torch

import rlkernels as rlk
from rlkernels.objectives import exp, tanh

CONTEXTS, ACTIONS, WIDTH, SAMPLES, EPOCHS = 32, 8, 16, 8, 4


@rlk.objective
def soft_clip(logp, old_logp, advantage, width=0.2):
    """``-A (1 + width tanh((rho - 1) / width))``."""
    ratio = exp(logp - old_logp)
    bend = tanh((ratio - 1.0) / width)
    return -advantage * (1.0 + width * bend), -advantage * ratio * (1.0 - bend * bend)


@rlk.objective
def wrong_clip(logp, old_logp, advantage, width=0.2):
    """The same value, with a derivative that forgets the factor ``rho`` of the chain rule."""
    bend = tanh((exp(logp - old_logp) - 1.0) / width)
    return -advantage * (1.0 + width * bend), -advantage * (1.0 - bend * bend)


def both_losses_agree():
    """Compares ``policy_loss`` with ``linear_policy_loss``, which makes the gradient of the head in its forward."""
    draw = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(6, 5, WIDTH, generator=draw), torch.randn(ACTIONS, WIDTH, generator=draw)
    targets = torch.randint(ACTIONS, (6, 5), generator=draw)
    advantages = torch.randn(6, 5, generator=draw)
    old = rlk.linear_token_logprobs(hidden, head, targets) + 0.1 * torch.randn(6, 5, generator=draw)
    options = {"objective": soft_clip, "width": 0.3}
    plain, linear = head.clone().requires_grad_(), head.clone().requires_grad_()
    logprobs = rlk.token_logprobs(hidden @ plain.T, targets)
    losses = (
        rlk.policy_loss(logprobs, old, advantages, **options),
        rlk.linear_policy_loss(hidden, linear, targets, old, advantages, **options),
    )
    for loss in losses:
        loss.backward()
    return *(loss.item() for loss in losses), (plain.grad - linear.grad).abs().max().item()


def train(objective, rounds):
    """Trains the bandit with an objective; returns the mean reward before, at quarters of the rounds, and after."""
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(CONTEXTS, WIDTH, generator=draw)
    right = torch.randint(ACTIONS, (CONTEXTS,), generator=draw)
    head = torch.zeros(ACTIONS, WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=3e-2)
    rows = torch.arange(CONTEXTS).repeat_interleave(SAMPLES)
    rewards = []
    for step in range(rounds + 1):
        probabilities = (states @ head.detach().T).softmax(1)
        if step % (rounds // 4) == 0:
            rewards.append(probabilities.gather(1, right[:, None]).mean().item())
        actions = probabilities[rows].multinomial(1, generator=draw).squeeze(1)
        advantages = rlk.group_advantages((actions == right[rows]).float(), rows, eps=1e-4)
        old = rlk.linear_token_logprobs(states[rows], head.detach(), actions)
        for _ in range(EPOCHS):
            loss = rlk.linear_policy_loss(states[rows], head, actions, old, advantages, objective=objective)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return rewards


def main(quick=False):
    rlk.check_objective(soft_clip)
    rlk.check_objective(soft_clip, width=0.5)
    print("soft_clip: the derivative is that of the value")
    try:
        rlk.check_objective(wrong_clip)
    except ValueError as error:
        print(f"wrong_clip: {error}")
    else:
        sys.exit("the wrong derivative went unseen")

    plain, linear, apart = both_losses_agree()
    print(f"policy_loss {plain:.6f}, linear_policy_loss {linear:.6f}, gradients apart by {apart:.0e}")
    if abs(plain - linear) > 1e-5 or apart > 1e-5:
        sys.exit("policy_loss and linear_policy_loss disagree")

    rounds = 8 if quick else 80
    print("mean reward   " + "".join(f"round {rounds * i // 4:<4}" for i in range(5)))
    for name, objective in (("soft_clip", soft_clip), ("ppo_clip", "ppo_clip")):
        rewards = train(objective, rounds)
        print(f"{name:14}" + "".join(f"{reward:<10.3f}" for reward in rewards))
        if not quick and rewards[-1] < 0.8:
            sys.exit(f"not learned: {name} has a mean reward of {rewards[-1]:.3f}, expected at least 0.8")
    if not quick:
        print("learned: both objectives take the mean reward above 0.8")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
