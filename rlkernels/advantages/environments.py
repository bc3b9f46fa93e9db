"""GAE of environments that run side by side, where episodes end inside of a rollout."""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.recurrence import reverse_recurrence
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import result_dtype
from rlkernels.types import DonesAt, Mask, Number, Rollout

DONES_AT = get_args(DonesAt)


@torch.no_grad()
def rollout_gae(
    rewards: Rollout,
    values: Rollout,
    last_values: Tensor | None = None,
    *,
    time_dim: int,
    gamma: Number = 0.99,
    lam: Number = 0.95,
    dones: Mask | None = None,
    dones_at: DonesAt = "end",
    last_dones: Mask | None = None,
    terminated: Mask | None = None,
    truncated: Mask | None = None,
    next_values: Rollout | None = None,
) -> tuple[Rollout, Rollout]:
    r"""Computes generalised advantage estimation over a rollout of environments, with the ends of their episodes.

    ``A_t = d_t + gamma lam (1 - end_t) A_{t+1}``,  ``d_t = r_t + gamma (1 - terminated_t) V'_t - V_t``,  ``R_t = A_t +
    V_t``;  ``V'_t``: the value of the state to which step ``t`` leads, ``end = dones or terminated or truncated``.

    ``dones`` alone are terminations. Beside ``terminated`` the other ones are cuts, and beside ``truncated`` those that
    are no cut are terminations. The state behind a cut is not the next one of the rollout, so that its value has to be
    in ``next_values``.

    Args:
        rewards, values: ``r``, ``V``, ``[T, N]`` (CleanRL, Stable-Baselines3), ``[N, T]``, ``[N, T, 1]`` (TorchRL): any
            shape with the dimension of time ``time_dim``; any float dtype, rewards also bool or integers.
        last_values: the values of the states after the last step, shaped like ``rewards`` without ``time_dim``; needed
            unless ``next_values`` is given.
        time_dim: the dimension of time.
        gamma, lam: discount and trace decay per step.
        dones: mask of the ends of episodes, shaped like ``rewards``.
        dones_at: ``"end"``: ``dones[t]`` says that step ``t`` ended an episode (Gymnasium, TorchRL); ``"start"``: that
            step ``t`` is the first of one (CleanRL's ``dones``, Stable-Baselines3's ``episode_starts``).
        last_dones: with ``"start"``, that of the state after the last step, shaped like ``last_values``; None: no end.
        terminated: mask of the steps after which nothing can follow; the next value counts as 0.
        truncated: mask of the steps after which an episode was cut off; the next value counts, the next advantage not.
        next_values: ``V'``, shaped like ``rewards``, of the last state of an episode where it was cut off.

    Returns:
        ``(advantages, returns)`` shaped like ``rewards``: float32, float64 for float64; not whitened, not
            differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes differ; ``time_dim`` names no dimension; ``gamma`` or ``lam`` outside
            [0, 1]; not one of ``last_values`` and ``next_values``; a cut without ``next_values``; ``"start"`` beside
            ``terminated`` or ``truncated``, ``last_dones`` without it.

    Example:
        >>> rewards, values = torch.tensor([[1.0], [1.0], [1.0]]), torch.zeros(3, 1)
        >>> dones = torch.tensor([[0], [1], [0]])
        >>> rollout_gae(rewards, values, torch.tensor([5.0]), time_dim=0, gamma=1.0, lam=1.0, dones=dones)[0].T
        tensor([[2., 1., 6.]])

    Schulman et al. 2016, arXiv:1506.02438, eq. 16; ends as in Pardo et al. 2018, arXiv:1712.00378.
    """
    caller = "rollout_gae"
    gamma, lam = (checks.interval(caller, name, x, 0, 1) for name, x in (("gamma", gamma), ("lam", lam)))
    checks_tokens.numbers(caller, "rewards", rewards)
    time_dim = checks.integer(caller, "time_dim", time_dim)
    if not -rewards.dim() <= time_dim < rewards.dim():
        raise ValueError(f"{caller}: time_dim is {time_dim}, rewards has shape {tuple(rewards.shape)}")
    ends = {"dones": dones, "terminated": terminated, "truncated": truncated}
    checks.floating(caller, "values", values)
    checks.shape(caller, "values", values, rewards.shape)
    for name, x in ends.items():
        checks.mask(caller, x, rewards.shape, name=name)
    of_last = [size for axis, size in enumerate(rewards.shape) if axis != time_dim % rewards.dim()]
    if (last_values is None) == (next_values is None):
        raise ValueError(f"{caller}: pass last_values or next_values, one of them")
    for name, x, shape in (("last_values", last_values, of_last), ("next_values", next_values, rewards.shape)):
        if x is not None:
            checks.floating(caller, name, x)
            checks.shape(caller, name, x, shape)
    checks.mask(caller, last_dones, of_last, name="last_dones")
    checks.choice(caller, "dones_at", dones_at, DONES_AT)
    if dones_at == "start" and (dones is None or terminated is not None or truncated is not None):
        raise ValueError(f"{caller}: dones_at 'start' takes dones, and neither terminated nor truncated")
    if last_dones is not None and dones_at != "start":
        raise ValueError(f"{caller}: last_dones needs dones_at 'start'")
    if next_values is None and (truncated is not None or (dones is not None and terminated is not None)):
        raise ValueError(f"{caller}: a cut needs next_values, because the next state of the rollout is another one's")
    given = {**ends, "last_values": last_values, "next_values": next_values, "last_dones": last_dones}
    checks.one_device(caller, "rewards", rewards, values=values, **given)
    checks.no_forward_ad(caller, rewards, values, last_values, next_values)

    def last(x: Tensor) -> Tensor:
        return x.movedim(time_dim, -1).contiguous()

    real = result_dtype(rewards, *(x for x in (values, last_values, next_values) if x is not None))
    reward, value = last(rewards).double(), last(values).double()
    nowhere = torch.zeros_like(reward, dtype=torch.bool)
    done, terminal, cut = (nowhere if x is None else last(x) != 0 for x in ends.values())
    if dones_at == "start":
        behind = nowhere[..., :1] if last_dones is None else (last_dones != 0).unsqueeze(-1)
        done = torch.cat([done[..., 1:], behind], -1)[..., : reward.shape[-1]]
    if terminated is None:
        terminal = done & ~cut
    if next_values is not None:
        following = last(next_values).double()
    elif last_values is not None:
        following = torch.cat([value[..., 1:], last_values.double().unsqueeze(-1)], -1)[..., : reward.shape[-1]]
    end = done | terminal | cut
    difference = reward + gamma * torch.where(terminal, 0.0, following) - value
    advantages = reverse_recurrence(difference, torch.where(end, 0.0, difference.new_full((), gamma * lam)))
    returns = advantages + value
    found = [x.to(real).movedim(-1, time_dim).contiguous() for x in (advantages, returns)]
    return found[0], found[1]
