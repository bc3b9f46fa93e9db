"""The protocol of a backend: what its functions take and return, and what several backends share.

A backend is a module with the functions of ``BackendModule``. Logits are ``[T, V]`` or ``[B, L, V]`` with unit last
stride; everything else of a row is ``[T]``, in the dtype ``real_dtype(logits.dtype)``. Sums have a fixed order.
``eager`` is their definition in plain torch. Everything in this module is free of kernels.
"""

from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from rlkernels.checks import COLDEST, HOTTEST
from rlkernels.types import Masked

Kernel = TypeVar("Kernel")
Params: TypeAlias = tuple[float, ...] | list[float] | Tensor
"""The numbers of an objective, in its order; one float64 tensor where the host may not read them."""

ENTROPY, LOG_SUM_SQ, MEAN_LOGITS, IS_TOP1, KL = 1, 2, 4, 8, 16
"""Bits of ``wanted``: the statistics of a row that are made only where they are asked for."""


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and of per-row results for logits of ``dtype``: float64 for float64, else float32.

    Raises:
        TypeError: ``dtype`` is no dtype. A tensor would compare unequal to float64 and be answered with float32.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"real_dtype takes a torch.dtype, got {type(dtype).__name__}; for tensors call result_dtype")
    return torch.float64 if dtype == torch.float64 else torch.float32


class RowBatch(NamedTuple):
    """Rows of logits and what belongs to each.

    ``temperature``: a number, or ``[T]``. ``vocab_mask``: None, ``[V]`` or ``[T, V]``, True keeps a column.
    ``ref_logits``: None, or logits of a second model, of the same shape and dtype.
    """

    logits: Tensor
    targets: Tensor
    temperature: float | Tensor
    ignore_index: int
    vocab_mask: Tensor | None = None
    ref_logits: Tensor | None = None


class RowStats(NamedTuple):
    """The statistics of each row, ``[T]``; of shape ``(0,)`` where they were not asked for.

    ``row_max``: the largest logit, before the temperature. ``sum_exp``: ``sum_v exp((x_v - row_max) / T)``.
    ``log_sum_sq``: ``log sum_v p_v^2``. ``kl``: ``KL(policy || reference)``. ``is_top1`` is bool.
    """

    logp: Tensor
    row_max: Tensor
    sum_exp: Tensor
    entropy: Tensor
    log_sum_sq: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    ref_logp: Tensor
    ref_row_max: Tensor
    ref_sum_exp: Tensor
    kl: Tensor

    @classmethod
    def empty(cls, like: Tensor, count: int, wanted: int, reference: bool) -> "RowStats":
        """Memory for the statistics of ``count`` rows, on the device of ``like`` and, but for ``is_top1``, in its
        dtype.

        ``like`` is empty, and stands for all that is absent: seven more tensors cost 5 us.
        """
        present = presence(wanted, reference)
        memory = [like.new_empty(count) if p else like for p in present]
        memory[TOP1] = like.new_empty(count if present[TOP1] else 0, dtype=torch.bool)
        return tuple.__new__(cls, memory)  # 0.3 us less than the constructor


TOP1 = RowStats._fields.index("is_top1")
"""The one field that is bool."""


def presence(wanted: int, reference: bool) -> tuple[int, ...]:
    """For each field of ``RowStats`` whether it is made: true or false, as any Python number is."""
    return (
        True,
        True,
        True,
        wanted & ENTROPY,
        wanted & LOG_SUM_SQ,
        wanted & MEAN_LOGITS,
        wanted & IS_TOP1,
        reference,
        reference,
        reference,
        reference and wanted & KL,
    )


class DivergenceRows(NamedTuple):
    """The divergence of each row from the teacher's, ``[T]``, and the gradient of the logits (``[0, 0]``: not asked
    for).
    """

    value: Tensor
    dlogits: Tensor


class SavedRows(NamedTuple):
    """The statistics that a gradient needs. The last three are those of a reference."""

    row_max: Tensor
    sum_exp: Tensor
    entropy: Tensor | None
    ref_row_max: Tensor | None = None
    ref_sum_exp: Tensor | None = None
    kl: Tensor | None = None


class Upstream(NamedTuple):
    """The gradients that arrive at the log-probability, the entropy and the exact KL of each row; None: none does."""

    dlogp: Tensor | None
    dentropy: Tensor | None = None
    dkl: Tensor | None = None


class PolicyInputs(NamedTuple):
    """An objective over rows of logits, with its KL and entropy terms.

    ``columns``: the objective's columns behind ``logp``. ``params``: its numbers. ``weight``, ``entropy_weight``,
    ``kl_weight``: ``[T]``, the weight of each token in each term. ``kl``: the name of an estimator over ``logp`` and
    ``ref_logp``; None: no KL term.
    """

    objective: str
    columns: list[Tensor]
    params: Params
    weight: Tensor
    entropy_weight: Tensor | None = None
    kl: str | None = None
    ref_logp: Tensor | None = None
    kl_weight: Tensor | None = None

    def read(self) -> Tensor:
        """Returns bool ``[T]``: the rows with a weight in any term; the others are not read."""
        found = self.weight != 0
        for weight in (self.entropy_weight, self.kl_weight):
            found = found if weight is None else found | (weight != 0)
        return found


class PolicyRows(NamedTuple):
    """The loss, the gradient of the logits for an upstream gradient of 1 (``[0, 0]``: not asked for), and what each row
    leaves for another backward.
    """

    loss: Tensor
    dlogits: Tensor
    logp: Tensor
    row_max: Tensor
    sum_exp: Tensor
    entropy: Tensor
    dlogp: Tensor


class BackendModule(Protocol):
    """The functions of a backend."""

    def token_stats(self, rows: RowBatch, wanted: int) -> RowStats: ...

    def token_stats_backward(
        self,
        upstream: Upstream,
        rows: RowBatch,
        saved: SavedRows,
        out: Tensor | None = None,
        unless: Tensor | None = None,
    ) -> Tensor:
        """Returns the gradient of the logits.

        ``out``: memory that takes it. ``unless``: a number on the device, which no host reads; where it is exactly 1,
        ``out`` stays as it is.
        """
        ...

    def fused_policy(self, rows: RowBatch, policy: PolicyInputs, with_grad: bool, out: Tensor | None) -> PolicyRows: ...

    def divergence(
        self,
        rows: RowBatch,
        kind: str,
        beta: float,
        weight: Tensor | None,
        out: Tensor | None = None,
        unless: Tensor | None = None,
    ) -> DivergenceRows:
        """Returns the divergences from ``rows.ref_logits``, the teacher's.

        With ``weight``, ``[T]``, the gradient of the sum of the divergences times their weights, too. A row whose
        target is ``ignore_index`` is dead; targets have no other meaning. ``kind``: a name of ``types.DivergenceKind``;
        ``beta`` is that of ``"jsd"``, strictly between 0 and 1. ``out``, ``unless``: as above.
        """
        ...

    def elementwise(
        self, objective: str, columns: list[Tensor], params: Params, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the weighted sum, and each element's value and derivative."""
        ...

    def weighted_loss(
        self,
        objective: str,
        first: Tensor,
        minus: Tensor | None,
        others: list[Tensor],
        params: Params,
        weight: Tensor | None,
        total: Tensor | None,
        share: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of ``first - minus - others[0]`` and so on, and the slopes of its columns."""
        ...

    def gae(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        gamma: float,
        lam: float,
        masked: Masked,
    ) -> tuple[Tensor, Tensor]:
        """Returns advantages and returns."""
        ...


def column_kernel(backend: str, what: str, dtype: torch.dtype, kernels: dict[torch.dtype, Kernel]) -> Kernel:
    """The kernel of a backend over columns of this dtype; ``kernels``: dtype to kernel.

    Raises:
        NotImplementedError: the backend has none.
    """
    kernel = kernels.get(dtype)
    if kernel is None:
        raise NotImplementedError(
            f'{what} of dtype {dtype} are not supported by backend {backend!r}; cast to float32 or use_backend("eager")'
        )
    return kernel


def check_rows(
    targets: Tensor, vocab: int, ignore_index: int, temperature: float | Tensor, caller: str | None = None
) -> None:
    """Refuses targets and temperatures of live rows that no kernel can take. On a CPU only, because elsewhere the host
    would wait for the device.

    ``caller``: the public function's name, if it is known.

    Raises:
        IndexError: a target outside of the vocabulary.
        ValueError: a temperature that is not positive, or that fp32 cannot divide by.
    """
    if targets.device.type != "cpu":
        return
    prefix = f"{caller}: " if caller else ""
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise IndexError(f"{prefix}target {int(targets[row])} at row {row} is outside [0, {vocab})")
    if isinstance(temperature, Tensor):
        bad = (targets != ignore_index) & ~((temperature >= COLDEST) & (temperature <= HOTTEST))
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"{prefix}temperature must be positive and finite, got {float(temperature[row])} at row "
                f"{row}; it may be from 2**-40 to 2**40"
            )
