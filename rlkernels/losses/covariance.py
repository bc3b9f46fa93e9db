"""The tokens that Clip-Cov leaves without loss, drawn before the loss."""

import torch

from rlkernels import checks
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.row_objectives import RowInputs, drawn_tokens
from rlkernels.losses.row_options import row_choice
from rlkernels.losses.token_weights import live_tokens
from rlkernels.sequences import per_token
from rlkernels.types import Mask, Number, PerToken, PerTokenOrSequence


@torch.no_grad()
def clip_cov_tokens(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerTokenOrSequence,
    mask: Mask | None = None,
    *,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    clip_cov_low: Number = 1.0,
    clip_cov_high: Number = 5.0,
    clip_cov_ratio: Number = 2e-4,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Draws the tokens that the objective ``"clip_cov"`` leaves without loss, for those who count them.

    They are ``max(1, floor(clip_cov_ratio n))`` of the ``n`` live tokens, or fewer, whose ``(A - mean A)(log pi - mean
    log pi)`` lies between the bounds, and which PPO does not clip.

    Args:
        logprobs, old_logprobs, advantages, mask: as for ``policy_loss``, padded.
        clip_low, clip_high, clip_cov_low, clip_cov_high, clip_cov_ratio, generator: the options of the objective.

    Returns:
        bool, shaped like ``logprobs``: what ``policy_loss(objective="clip_cov", clip_cov_tokens=...)`` takes.

    Raises:
        TypeError, ValueError: as ``policy_loss``.

    Example:
        >>> logprobs, advantages = torch.tensor([[-3.0, -0.1, -1.0]]), torch.tensor([[-4.0, 3.0, 0.0]])
        >>> clip_cov_tokens(logprobs, logprobs, advantages, clip_cov_ratio=1.0)
        tensor([[False,  True, False]])

    Cui et al. 2025, arXiv:2505.22617; verl.
    """
    caller = "clip_cov_tokens"
    checks.floating(caller, "logprobs", logprobs)
    column(caller, "old_logprobs", old_logprobs, logprobs)
    checks.floating(caller, "advantages", advantages)
    options = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "clip_cov_low": clip_cov_low,
        "clip_cov_high": clip_cov_high,
        "clip_cov_ratio": clip_cov_ratio,
        "generator": generator,
    }
    choice = row_choice(caller, "clip_cov", options, logprobs, None, "token", advantages, None)
    advantages = per_token(caller, "advantages", advantages, logprobs, None)
    column(caller, "advantages", advantages, logprobs)
    live = live_tokens(caller, logprobs, mask)
    wide = [x.detach().double() for x in (logprobs, old_logprobs, advantages)]
    return drawn_tokens(RowInputs(wide[0], wide[1:], live.double(), live, None, choice.options, None, None, None))
