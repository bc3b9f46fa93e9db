"""Log-probabilities and row statistics from logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import RowStats
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import flatten_logits, matrix
from rlkernels.tracing import replaced
from rlkernels.types import Logits, Outputs, RowKL, Targets, Temperature, VocabMask


class TokenStats(NamedTuple):
    """The statistics per token of a softmax over the vocabulary; one that was not asked for is None.

    ``logprobs``, ``logsumexp``, ``entropy``, ``mean_logits`` and ``kl`` are differentiable with respect to the logits.
    A backward through ``log_sum_sq_probs`` raises RuntimeError, except in a compiled program, where it is a constant.
    Float fields are fp32 (fp64 for fp64 logits).

    Example:
        >>> token_stats(torch.zeros(1, 4), torch.tensor([2])).logsumexp
        tensor([1.3863])
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    kl: torch.Tensor | None = None


def token_logprobs(
    logits: Logits,
    targets: Targets,
    *,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Computes the log-probability of each target token under a softmax over the vocabulary, in one pass over the row.

    ``log pi(y) = z_y - log sum_v exp(z_v)``, ``z = logits / temperature``, computed from the row maximum in fp32.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64. A unit last stride and any others cost no copy.
        targets: ``[...]`` token ids, int32 or int64. ``logits[t]`` scores ``targets[t]``: nothing is shifted here. Or
            ``[..., K]``, ``K`` ids per row, which take one read of the row; an id may occur twice.
        temperature: ``T``, from ``2**-40`` (9.1e-13) to ``2**40``; a number, or a tensor: ``[...]`` with one per token,
            ``[B]`` or ``[B, 1]`` with one per sequence of ``[B, L]``, ``[]`` with one for all. That of an ignored token
            is not looked at.
        ignore_index: a token with this target is not read: its result and its gradient are 0.
        vocab_mask: bool ``[V]`` or ``[..., V]``, True keeps a column; the others count as logits of -inf.
        inplace_backward: the backward writes the gradient over ``logits``; nothing of their size is allocated. A later
            backward through the logits, a view or a ``detach()`` of them raises. Memory that they share by ``.data``,
            ``set_`` or numpy is overwritten in silence.

    Returns:
        Tensor ``[...]``, or ``[..., K]``, fp32 (fp64 for fp64 logits), differentiable once.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape.
        IndexError: on the CPU, a target outside ``[0, V)`` that is not ``ignore_index``.
        RuntimeError: tensors on several devices; ``inplace_backward`` on a leaf, a view of a leaf, or overlapping
            memory.

    Example:
        >>> token_logprobs(torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([1, 0]))
        tensor([-0.3133, -0.6931])
    """
    caller = "token_logprobs"
    several = _several(logits, targets)
    first = targets[..., 0] if several else targets
    flat = flatten_logits(caller, logits, first, temperature, ignore_index, vocab_mask, inplace_backward)
    if several:
        ids = checks_tokens.holding(caller, targets, flat.rows.ignore_index)
        ids = ids.reshape(flat.rows.targets.shape[0], targets.shape[-1])
        rows = replaced(flat.rows, targets=ids)
        return ops.target_logprobs(rows, inplace_backward, ops.serving("token_stats", logits)).view(targets.shape)
    stats = ops.token_stats(flat.rows, 0, inplace_backward, ops.serving("token_stats", logits))
    return shaped(stats.logp, flat.shape)


def _several(logits: Logits, targets: Targets) -> bool:
    """Tells whether there are several targets per row: one dimension more than that of one per row."""
    if not isinstance(logits, torch.Tensor) or not isinstance(targets, torch.Tensor):
        return False
    same = logits.dim() == targets.dim() > 0 and logits.shape[:-1] == targets.shape[:-1]
    return same and targets.shape[-1] > 0


def token_stats(
    logits: Logits,
    targets: Targets,
    *,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    ref_logits: Logits | None = None,
    kl: RowKL | None = None,
    outputs: Outputs = ("entropy",),
    inplace_backward: bool = False,
) -> TokenStats:
    r"""Computes log-probability, logsumexp and the wanted statistics of each row, of one model or of two, in one pass
    over the row(s).

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
        TypeError, ValueError, IndexError, RuntimeError: as ``token_logprobs``; an unknown output or estimator; a
            backward through ``log_sum_sq_probs``.

    Example:
        >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]), outputs=("entropy", "is_top1"))
        >>> stats.logprobs, stats.entropy, stats.is_top1
        (tensor([-1.3863]), tensor([1.3863]), tensor([False]))

    Schulman 2020, "Approximating KL divergence".
    """
    caller = "token_stats"
    flat = flatten_logits(caller, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward)
    checks.outputs(caller, outputs, ops.FLAGS)
    checks.reference(caller, ref_logits, logits, kl)
    checks.one_device(caller, "logits", logits, ref_logits=ref_logits)
    wanted = 0
    for name in outputs:
        wanted |= ops.FLAGS[name]
    if kl == "exact":
        wanted |= ops.KL | ops.ENTROPY  # the gradient of the KL is saved beside the entropy's
    rows = flat.rows if ref_logits is None else replaced(flat.rows, ref_logits=matrix(ref_logits))
    serving = ops.serving(caller, logits, models=1 if ref_logits is None else 2)
    stats = ops.token_stats(rows, wanted, inplace_backward, serving)
    return collect(stats, flat.shape, rows.temperature, outputs, ref_logits is not None, kl)


def shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """Returns ``x`` in the caller's shape; ``x`` itself where it has that shape, because a view costs an operation."""
    return x if x.shape == shape else x.view(shape)


def collect(
    stats: RowStats, shape: torch.Size, temperature: Temperature, outputs: Outputs, reference: bool, kl: RowKL | None
) -> TokenStats:
    """Returns ``RowStats`` as the ``TokenStats`` that were asked for, of the caller's shape."""
    # Only ignored rows are empty. They get the log of 1, because that of 0 has no gradient.
    empty = stats.sum_exp == 0
    # A number stays on the CPU: copying it to the device would make the host wait.
    logsumexp = torch.where(empty, 0.0, stats.row_max / temperature + torch.where(empty, 1.0, stats.sum_exp).log())
    optional = {
        "entropy": stats.entropy,
        "log_sum_sq_probs": stats.log_sum_sq,
        "mean_logits": stats.mean_logits,
        "is_top1": stats.is_top1,
    }
    optional = {name: x.view(shape) for name, x in optional.items() if name in outputs}
    for name in ("log_sum_sq_probs", "mean_logits"):
        if name in optional:
            optional[name] = ops.without_gradient(name, optional[name], stats.logp)
    if reference:
        optional["ref_logprobs"] = stats.ref_logp.view(shape)
    if kl == "exact":
        optional["kl"] = stats.kl.view(shape)
    elif kl is not None:
        serving = ops.serving("elementwise", stats.logp)
        _, estimate, _ = ops.elementwise(kl, stats.logp, [stats.ref_logp], (), None, serving)
        optional["kl"] = estimate.view(shape)
    logsumexp = ops.without_gradient("logsumexp", logsumexp.view(shape), stats.logp)
    return TokenStats(stats.logp.view(shape), logsumexp, **optional)
