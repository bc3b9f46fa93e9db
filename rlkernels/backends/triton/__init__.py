"""Triton backend: every op on the GPUs that Triton compiles for. Imported only where it serves."""

from rlkernels.backends.triton.divergence_kernel import divergence
from rlkernels.backends.triton.launch import (
    elementwise,
    fused_policy,
    gae,
    token_stats,
    token_stats_backward,
    weighted_loss,
)

__all__ = ["divergence", "elementwise", "fused_policy", "gae", "token_stats", "token_stats_backward", "weighted_loss"]
