"""V-trace: values and advantages of data that another policy sampled."""

import torch

from rlkernels import checks
from rlkernels.advantages.recurrence import steps_of
from rlkernels.checks import tokens as checks_tokens
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import result_dtype
from rlkernels.tracing import without_gradient
from rlkernels.types import Mask, Number, Offsets, PerSequence, PerToken


@takes_one_row(per_token=True)
@without_gradient
def vtrace(
    rewards: PerToken,
    values: PerToken,
    logprobs: PerToken,
    old_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    gamma: Number = 1.0,
    lam: Number = 1.0,
    rho_max: Number = 1.0,
    c_max: Number = 1.0,
    advantage_rho_max: Number | None = None,
    terminated: Mask | None = None,
    cu_seqlens: Offsets | None = None,
    bootstrap_values: PerSequence | None = None,
) -> tuple[PerToken, PerToken]:
    r"""Computes V-trace targets of the value function, and the advantages of the policy gradient that belong to them.

    ``v_t = V_t + d_t + gamma c_t (v_{t+1} - V_{t+1})``,  ``d_t = rho_t (r_t + gamma V_{t+1} - V_t)``,  ``A_t = rho'_t
    (r_t + gamma v_{t+1} - V_t)``;  ``rho = min(rho_max, pi / pi_old)``, ``rho'`` with ``advantage_rho_max``, ``c = lam
    min(c_max, pi / pi_old)``; ``V`` and ``v`` behind the last live token are the bootstrap value, 0 without one.

    Args:
        rewards, values: ``r``, ``V`` per token, ``[B, L]`` or packed ``[N]`` with ``cu_seqlens``; any float dtype,
            rewards also bool or integers.
        logprobs, old_logprobs: of the policy, and of the one that sampled; shaped like ``rewards``.
        mask: live tokens, any pattern. A dead token is no step: value and trace pass over it undiscounted. What it
            holds changes nothing, and both outputs are 0 there.
        gamma, lam: discount and trace decay per live token.
        rho_max, c_max: bounds of the ratio in the temporal difference and in the trace.
        advantage_rho_max: the bound in the advantage; None: ``rho_max``.
        terminated: mask of steps after which an episode is over, shaped like ``rewards``; what follows is another one.
        bootstrap_values: ``[B]``, or ``[S]`` when packed: as for ``gae``.

    Returns:
        ``(advantages, targets)`` shaped like ``rewards``: float32, float64 for float64; not differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes differ; ``gamma`` or ``lam`` outside [0, 1]; a bound not positive.

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> vtrace(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), zeros, zeros + 0.6931, gamma=1.0)
        (tensor([[0.1250, 0.2500]]), tensor([[0.6250, 0.7500]]))

    Espeholt et al. 2018 (IMPALA), arXiv:1802.01561, section 4.1.
    """
    caller = "vtrace"
    gamma, lam = (checks.interval(caller, name, x, 0, 1) for name, x in (("gamma", gamma), ("lam", lam)))
    rho_max, c_max = (checks.positive(caller, name, x) for name, x in (("rho_max", rho_max), ("c_max", c_max)))
    if advantage_rho_max is None:
        advantage_rho_max = rho_max
    advantage_rho_max = checks.positive(caller, "advantage_rho_max", advantage_rho_max)
    checks_tokens.numbers(caller, "rewards", rewards)
    columns = {"values": values, "logprobs": logprobs, "old_logprobs": old_logprobs}
    for name, x in columns.items():
        checks.floating(caller, name, x)
        checks.shape(caller, name, x, rewards.shape)
    checks_tokens.layout(caller, "rewards", rewards, cu_seqlens)
    checks.mask(caller, mask, rewards.shape)
    checks.mask(caller, terminated, rewards.shape, name="terminated")
    offsets = None if cu_seqlens is None else checks_tokens.segments(caller, cu_seqlens, rewards, mask=mask)
    if bootstrap_values is not None:
        checks.floating(caller, "bootstrap_values", bootstrap_values)
        sequences = rewards.shape[:1] if offsets is None else (offsets.shape[0] - 1,)
        checks.shape(caller, "bootstrap_values", bootstrap_values, sequences)
    checks.one_device(
        caller, "rewards", rewards, mask=mask, terminated=terminated, bootstrap_values=bootstrap_values, **columns
    )
    checks.no_forward_ad(caller, rewards, *columns.values(), bootstrap_values)

    real = result_dtype(rewards, *columns.values())
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    steps = steps_of(live.contiguous(), offsets)
    at_end: torch.Tensor | float = 0.0
    if bootstrap_values is not None:
        at_end = steps.expand(bootstrap_values.double())
    if terminated is not None:
        over = terminated != 0
        steps, at_end = steps.cut(over), torch.where(over, 0.0, at_end)
    reward, value, gap = (
        torch.where(live, x, 0.0)
        for x in (rewards.double(), values.double(), logprobs.double() - old_logprobs.double())
    )
    ratio = gap.exp()
    difference = ratio.clamp(max=rho_max) * (reward + gamma * steps.ahead(value, at_end) - value)
    targets = value + steps.scan(difference, gamma * lam * ratio.clamp(max=c_max))
    gain = reward + gamma * steps.ahead(targets, at_end) - value
    advantages = torch.where(live, ratio.clamp(max=advantage_rho_max) * gain, 0.0)
    return advantages.to(real), torch.where(live, targets, 0.0).to(real)
