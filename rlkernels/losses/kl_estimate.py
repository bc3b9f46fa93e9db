"""The KL to a reference per token, estimated from log-probabilities of the taken tokens."""

from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import real_dtype
from rlkernels.logits_layout import dense
from rlkernels.losses.kl_term import kl_objective
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.token_weights import live_mask
from rlkernels.types import KL, Clamp, KLGradient, Mask, PerToken


def kl_estimate(
    logprobs: PerToken,
    ref_logprobs: PerToken,
    kind: KL = "k3",
    *,
    mask: Mask | None = None,
    old_logprobs: PerToken | None = None,
    diff_clamp: Clamp = None,
    value_clamp: Clamp = None,
    gradient: KLGradient = "pathwise",
    ratio_weighted: bool = False,
    ratio_detached: bool = False,
    ratio_cap: float | None = None,
) -> Tensor:
    r"""Estimates ``KL(pi || ref)`` per token, in one launch.

    With ``d = log pi - log ref``: ``"k1"`` is ``d``, ``"abs"`` ``|d|``, ``"k2"`` ``d^2 / 2``, ``"k3"`` ``e^-d - 1 +
    d``. As a penalty in the reward, detach it; as a term of a loss, ``aggregate`` it, or pass ``kl=`` to the loss.

    Args:
        logprobs: ``[...]``; the log-probabilities under the policy, the only argument that gets a gradient.
        ref_logprobs: same shape, under the reference.
        mask: live tokens, same shape; the value of a dead token is 0, whatever it holds.
        old_logprobs: same shape, under the behaviour policy, for ``ratio_weighted``; None stands for the detached
            ``logprobs``.
        diff_clamp, value_clamp, gradient, ratio_weighted, ratio_detached, ratio_cap: as for ``KLTerm``.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 inputs), differentiable once.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit; as ``KLTerm``; ``old_logprobs`` without ``ratio_weighted``.

    Example:
        >>> kl_estimate(torch.tensor([-20.0, -1.0]), torch.tensor([-10.0, -2.0]), value_clamp=10.0)
        tensor([10.0000,  0.3679])

    Schulman 2020, "Approximating KL divergence".
    """
    caller = "kl_estimate"
    checks.floating(caller, "logprobs", logprobs)
    checks.no_forward_ad(caller, logprobs)
    options = gradient, ratio_weighted, ratio_detached, ratio_cap
    objective = kl_objective(caller, "kind", kind, diff_clamp, value_clamp, *options)
    column(caller, "ref_logprobs", ref_logprobs, logprobs)
    if old_logprobs is not None:
        column(caller, "old_logprobs", old_logprobs, logprobs)
        if not ratio_weighted:
            raise ValueError(f"{caller}: old_logprobs belongs to ratio_weighted=True, got ratio_weighted=False")
    live = live_mask(caller, logprobs, mask)
    real = real_dtype(logprobs.dtype)
    logp = dense(logprobs, real)
    others = [dense(x, real) for x in objective.others(logp, ref_logprobs, old_logprobs)]
    weight = None if live is None else live.to(real)
    return ops.elementwise(objective.name, logp, others, objective.params, weight, ops.serving("elementwise", logp))[1]
