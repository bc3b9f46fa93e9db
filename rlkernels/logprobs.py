"""Log-probabilities and row statistics from logits."""

from typing import NamedTuple

import torch

from rlkernels import checks, ops
from rlkernels.logits_layout import matrix, rows


class TokenStats(NamedTuple):
    """The statistics per token of a softmax over the vocabulary; one that was not asked for is None.

    ``logprobs``, ``entropy`` and ``kl`` are differentiable with respect to the logits. Float fields are fp32 (fp64 for
    fp64 logits).
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    kl: torch.Tensor | None = None


def token_logprobs(logits, targets, *, temperature=1.0, ignore_index=-100, vocab_mask=None, inplace_backward=False):
    r"""Log-probability of each target token under a softmax over the vocabulary, in one pass over the row.

    ``log pi(y) = z_y - log sum_v exp(z_v)``, ``z = logits / temperature``, computed from the row maximum in fp32.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64. A unit last stride and any others cost no copy.
        targets: ``[...]`` token ids, int32 or int64. ``logits[t]`` scores ``targets[t]``: nothing is shifted here.
        temperature: ``T``, from ``2**-40`` (9.1e-13) to ``2**40``; a number, or a tensor: ``[...]`` with one per token,
            ``[B]`` or ``[B, 1]`` with one per sequence of ``[B, L]``, ``[]`` with one for all. That of an ignored token
            is not looked at.
        ignore_index: a token with this target is not read: its result and its gradient are 0.
        vocab_mask: bool ``[V]`` or ``[..., V]``, True keeps a column; the others count as logits of -inf.
        inplace_backward: the backward writes the gradient over ``logits``; nothing of their size is allocated. A later
            backward through the logits, a view or a ``detach()`` of them raises. Memory that they share by ``.data``,
            ``set_`` or numpy is overwritten in silence.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 logits), differentiable once.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape.
        IndexError: on the CPU, a target outside ``[0, V)`` that is not ``ignore_index``.
        RuntimeError: tensors on several devices; ``inplace_backward`` on a leaf, a view of a leaf, or overlapping
            memory.
    """
    row = rows("token_logprobs", logits, targets, temperature, ignore_index, vocab_mask, inplace_backward)
    logp, *_ = ops.token_stats(
        row.logits,
        row.targets,
        row.temperature,
        row.ignore_index,
        row.vocab_mask,
        None,
        0,
        inplace_backward,
        ops.serving("token_stats", logits),
    )
    return shaped(logp, row.shape)


def token_stats(
    logits,
    targets,
    *,
    temperature=1.0,
    ignore_index=-100,
    vocab_mask=None,
    ref_logits=None,
    kl=None,
    outputs=("entropy",),
    inplace_backward=False,
):
    r"""Log-probability, logsumexp and the wanted statistics of each row, of one model or of two, in one pass over the
    row(s).

    ``H = -sum_v p_v log p_v``;  ``log_sum_sq_probs = log sum_v p_v^2``;  ``mean_logits``: mean of ``z`` over the
    vocabulary (over the mask's support);  ``is_top1``: the target is the first maximal column;  ``kl="exact"``: ``KL(pi
    || ref) = sum_v p_v (log p_v - log q_v)``; ``"k1"``, ``"k2"``, ``"k3"``: Schulman's estimators on the target token.

    Args:
        logits, targets, temperature, ignore_index, vocab_mask, inplace_backward: as for ``token_logprobs``.
        ref_logits: ``[..., V]`` of the reference model, same dtype, no gradient; read in the same pass, under the same
            temperature and mask.
        kl: which KL to return; needs ``ref_logits``.
        outputs: names among ``entropy``, ``log_sum_sq_probs``, ``mean_logits``, ``is_top1``.

    Returns:
        TokenStats of tensors ``[...]``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_logprobs``; an unknown output or estimator.

    Schulman 2020, "Approximating KL divergence".
    """
    caller = "token_stats"
    row = rows(caller, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward)
    checks.outputs(caller, outputs, ops.FLAGS)
    checks.reference(caller, ref_logits, logits, kl)
    checks.one_device(caller, "logits", logits, ref_logits=ref_logits)
    wanted = 0
    for name in outputs:
        wanted |= ops.FLAGS[name]
    if kl == "exact":
        wanted |= ops.KL | ops.ENTROPY  # the gradient of the KL is saved beside the entropy's
    reference = None if ref_logits is None else matrix(ref_logits)
    stats = ops.token_stats(
        row.logits,
        row.targets,
        row.temperature,
        row.ignore_index,
        row.vocab_mask,
        reference,
        wanted,
        inplace_backward,
        ops.serving(caller, logits),
    )
    return collect(stats, row, outputs, ref_logits is not None, kl)


def shaped(x, shape):
    """Returns ``x`` in the caller's shape; ``x`` itself where it has that shape, because a view costs an operation."""
    return x if x.shape == shape else x.view(shape)


def collect(op_outputs, row, outputs, has_reference, kl):
    """Turns the tuple that the op returned into TokenStats of the caller's shape."""
    logp, shift, sum_exp, entropy, log_sum_sq, mean_logits, is_top1, ref_logp, _, _, exact = op_outputs
    # The 0.0 stays on the CPU, because copying it to the device would make the host wait. Only in ignored rows is
    # sum_exp 0.
    logsumexp = torch.where(sum_exp == 0, 0.0, shift / row.temperature + sum_exp.log())
    stats = {"entropy": entropy, "log_sum_sq_probs": log_sum_sq, "mean_logits": mean_logits, "is_top1": is_top1}
    stats = {name: x.view(row.shape) for name, x in stats.items() if name in outputs}
    if has_reference:
        stats["ref_logprobs"] = ref_logp.view(row.shape)
    if kl == "exact":
        stats["kl"] = exact.view(row.shape)
    elif kl is not None:
        _, value, _ = ops.elementwise(kl, logp, [ref_logp], (), None, ops.serving("elementwise", logp))
        stats["kl"] = value.view(row.shape)
    return TokenStats(logp.view(row.shape), logsumexp.view(row.shape), **stats)
