"""Weights of pairs."""

from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.token_weights import live_tokens
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import means
from rlkernels.tracing import without_gradient
from rlkernels.types import Mask, Offsets, PerToken


@takes_one_row()
@without_gradient
def wpo_weights(
    logprobs: PerToken,
    mask: Mask | None = None,
    *,
    log_sum_sq_probs: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
) -> Tensor:
    r"""Weighs each pair by how likely its answers are under the policy, so that pairs count as if they were on-policy.

    ``w_i = exp(mean_t(logp_ct - q_ct) + mean_t(logp_rt - q_rt))``, ``q = log sum_v p_v^2``, as TRL does; without ``q``
    ``min(1, exp(mean_t logp_ct + mean_t logp_rt))``, as open-instruct does. The weights go into ``dpo_loss`` as
    ``pair_weights``.

    Args:
        logprobs: of the answers' tokens under the policy, ``[2B, L]``, the chosen answers first; or packed ``[N]`` with
            ``cu_seqlens`` ``[2B + 1]``. No gradient flows.
        mask: the tokens of the answers, same shape.
        log_sum_sq_probs: ``q`` of ``token_stats``, same shape.

    Returns:
        ``[B]``, fp32 (fp64 for fp64 log-probabilities), detached. The mean of an answer without a live token is 0.

    Raises:
        TypeError: no floats. ValueError: shapes differ; an odd number of answers.

    Example:
        >>> wpo_weights(torch.tensor([[-1.0, -3.0], [-0.5, 0.0]]), torch.tensor([[1, 1], [1, 0]]))
        tensor([0.0821])

    Zhou et al. 2024, arXiv:2406.11827.
    """
    caller = "wpo_weights"
    checks.floating(caller, "logprobs", logprobs)
    offsets = checks_tokens.rows(caller, "logprobs", logprobs, cu_seqlens, mask)
    if offsets is None and logprobs.dim() != 2:
        raise ValueError(
            f"{caller}: logprobs has shape {tuple(logprobs.shape)}, expected [2B, L], or [N] with cu_seqlens"
        )
    checks.no_forward_ad(caller, logprobs)
    live, logprobs = live_tokens(caller, logprobs, mask), logprobs.detach()
    if log_sum_sq_probs is not None:
        checks.floating(caller, "log_sum_sq_probs", log_sum_sq_probs)
        checks.no_forward_ad(caller, log_sum_sq_probs)
        logprobs = logprobs - column(caller, "log_sum_sq_probs", log_sum_sq_probs.detach(), logprobs)
    of_answers = means(logprobs, live, offsets)
    pairs, odd = divmod(of_answers.shape[0], 2)
    if odd:
        raise ValueError(
            f"{caller}: logprobs holds {of_answers.shape[0]} answers; they come in pairs: the chosen ones first, then "
            "the rejected ones"
        )
    weights = (of_answers[:pairs] + of_answers[pairs:]).exp()
    return weights if log_sum_sq_probs is not None else weights.clamp(max=1.0)
