"""The boundary between functions and backends: every op with its autograd formula.

Run-time numbers (temperature, clip bounds, beta) reach a registered op as float64 CPU tensors: ``torch.compile``
specialises a Python float and compiles again for each value. The backend is an argument, chosen where the function was
called: the backward of an accelerator runs in another thread.

A registered op is flat: its arguments are tensors and numbers. ``token_stats`` and ``fused_policy`` take and return the
named tuples of ``rlkernels.backends.protocol``, and ``token_stats_op`` and ``fused_policy_op`` are what they call. No
module here has the name of a function, because one would hide the other.
"""

from rlkernels.backends import serving as _serving
from rlkernels.backends.protocol import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS
from rlkernels.ops.columns import elementwise, elementwise_backward, weighted_loss, weighted_loss_backward
from rlkernels.ops.divergence import (
    Teacher,
    divergence_backward,
    divergence_backward_into,
    divergence_op,
    divergences,
    run_divergence,
    weighted,
)
from rlkernels.ops.loss_with_gradients import with_gradients
from rlkernels.ops.packed import gae, offsets
from rlkernels.ops.policy import fused_policy, fused_policy_op, run_fused
from rlkernels.ops.register import calls, define, run, without_gradient
from rlkernels.ops.rows import (
    target_gradient,
    token_stats,
    token_stats_backward,
    token_stats_backward_,
    token_stats_backward_into,
    token_stats_fake,
    token_stats_op,
)
from rlkernels.ops.several_targets import target_logprobs, target_logprobs_op
from rlkernels.tracing import number, numbers

__all__ = [
    "ENTROPY",
    "FLAGS",
    "KL",
    "Teacher",
    "calls",
    "define",
    "divergence_backward",
    "divergence_backward_into",
    "divergence_op",
    "divergences",
    "elementwise",
    "elementwise_backward",
    "fused_policy",
    "fused_policy_op",
    "gae",
    "number",
    "numbers",
    "offsets",
    "run",
    "run_divergence",
    "run_fused",
    "serving",
    "target_gradient",
    "target_logprobs",
    "target_logprobs_op",
    "token_stats",
    "token_stats_backward",
    "token_stats_backward_",
    "token_stats_backward_into",
    "token_stats_fake",
    "token_stats_op",
    "weighted",
    "weighted_loss",
    "weighted_loss_backward",
    "with_gradients",
    "without_gradient",
]

FLAGS = {"entropy": ENTROPY, "log_sum_sq_probs": LOG_SUM_SQ, "mean_logits": MEAN_LOGITS, "is_top1": IS_TOP1}
"""Names of outputs in the public functions, and their bits."""


def serving(op, tensor, *, models=1, objective=None):
    """Returns the backend for ``op`` on this tensor; of logits, the last dimension counts too.

    ``models``: those whose statistics are taken in one pass. ``objective``: that of ``fused_policy``.
    """
    if tensor.is_cpu:
        return _serving(op, "cpu")
    device, vocab = tensor.device, tensor.shape[-1] if tensor.dim() > 1 else None
    return _serving(op, device.type, tensor.dtype, vocab, index=device.index, models=models, objective=objective)
