"""PPO on CartPole: clipped policy and value losses, an entropy bonus, and GAE that knows cuts from ends.

    pip install gymnasium
    python examples/ppo_cartpole.py             # solves the task: a mean return of 475 or more
    python examples/ppo_cartpole.py --quick     # a few steps, which learn nothing yet

Nothing here is a language model. The "vocabulary" is the two actions, and a row of logits is the policy of one state.
So ``token_stats`` gives the log-probability of the action and the entropy, and ``policy_loss`` takes them from there.

An episode of CartPole ends in two ways. The pole falls (``terminated``): nothing follows, so the next value is 0. Or
500 steps are over (``truncated``): the pole still stands, so the value of the last state counts. ``rollout_gae`` takes
both masks and the values of the next states.
"""

import sys

import torch
from torch import nn

import rlkernels as rlk

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode
except ImportError:
    sys.exit("ppo_cartpole.py needs gymnasium 1.1 or newer: pip install gymnasium")

ENVS, STEPS, EPOCHS, MINIBATCH = 8, 32, 20, 256
GAMMA, LAM, CLIP, LEARNING_RATE = 0.98, 0.8, 0.2, 1e-3
SOLVED = 475.0  # of at most 500


def network(outputs):
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


@torch.no_grad()
def collect(envs, obs, actor, critic):
    """Plays STEPS steps in all environments; returns their columns, [STEPS, ENVS], and the last observations."""
    names = ("obs", "actions", "logprobs", "rewards", "terminated", "truncated", "next_obs")
    found = {name: [] for name in names}
    for _ in range(STEPS):
        x = torch.as_tensor(obs, dtype=torch.float32)
        logits = actor(x)
        actions = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        obs, rewards, terminated, truncated, info = envs.step(actions.numpy())
        # An environment that has ended is reset in the same step. Its last observation is in the info, and GAE needs
        # the value of that one, because the observation of the new episode says nothing about the old one.
        next_obs = torch.as_tensor(obs, dtype=torch.float32)
        for i in (terminated | truncated).nonzero()[0]:
            next_obs[i] = torch.as_tensor(info["final_obs"][i])
        step = (x, actions, rlk.token_logprobs(logits, actions), rewards, terminated, truncated, next_obs)
        for name, column in zip(names, step, strict=True):
            found[name].append(torch.as_tensor(column))
    batch = {name: torch.stack(column) for name, column in found.items()}
    batch["rewards"] = batch["rewards"].float()
    batch["values"] = critic(batch["obs"])[..., 0]
    batch["advantages"], batch["returns"] = rlk.rollout_gae(
        batch["rewards"],
        batch["values"],
        next_values=critic(batch["next_obs"])[..., 0],
        terminated=batch["terminated"],
        truncated=batch["truncated"],
        time_dim=0,
        gamma=GAMMA,
        lam=LAM,
    )
    return {name: column.flatten(0, 1) for name, column in batch.items()}, obs


def update(batch, actor, critic, optimizer, clip):
    """Takes EPOCHS passes over a batch; returns the metrics of the last minibatch."""
    for _ in range(EPOCHS):
        for part in torch.randperm(len(batch["obs"])).split(MINIBATCH):
            b = {name: column[part] for name, column in batch.items()}
            stats = rlk.token_stats(actor(b["obs"]), b["actions"], outputs=("entropy",))
            policy, metrics = rlk.policy_loss(
                stats.logprobs,
                b["logprobs"],
                rlk.masked_whiten(b["advantages"]),
                clip_low=clip,
                clip_high=clip,
                entropy=stats.entropy,
                entropy_coef=0.001,
                return_metrics=True,
            )
            # The clip of the value has the unit of the returns, which lie between 0 and 50 with this GAMMA.
            value = rlk.value_loss(critic(b["obs"])[:, 0], b["values"], b["returns"], clip_range=10.0)
            optimizer.zero_grad()
            (policy + value).backward()
            for net in (actor, critic):
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
    return metrics


@torch.no_grad()
def evaluate(actor, episodes):
    """Returns the mean return of the policy's likeliest actions."""
    env, total = gymnasium.make("CartPole-v1"), 0.0
    for seed in range(10_000, 10_000 + episodes):
        obs, over = env.reset(seed=seed)[0], False
        while not over:
            action = actor(torch.as_tensor(obs, dtype=torch.float32)).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
    return total / episodes


def main(quick=False):
    torch.manual_seed(0)
    updates, episodes = (2, 2) if quick else (200, 20)
    envs = gymnasium.make_vec(
        "CartPole-v1",
        num_envs=ENVS,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )
    obs, actor, critic = envs.reset(seed=0)[0], network(2), network(1)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=LEARNING_RATE)
    print(" steps  mean return  entropy  clipped")
    print(f"{0:6}  {evaluate(actor, episodes):11.1f}")
    for step in range(1, updates + 1):
        left = 1.0 - (step - 1) / updates  # rate and clip go to 0, so that the policy settles
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * left
        batch, obs = collect(envs, obs, actor, critic)
        metrics = update(batch, actor, critic, optimizer, CLIP * left)
        if step % max(updates // 5, 1) == 0:
            score = evaluate(actor, episodes)
            entropy, clipped = metrics["entropy"].item(), metrics["clip_fraction"].item()
            print(f"{step * STEPS * ENVS:6}  {score:11.1f}  {entropy:7.3f}  {clipped:7.3f}")
    if quick:
        return
    if score < SOLVED:
        sys.exit(f"not solved: a mean return of {score:.1f}, expected at least {SOLVED}")
    print(f"solved: a mean return of {score:.1f} in {episodes} episodes")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
