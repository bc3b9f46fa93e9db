"""Moments of a batch that lies in parts: over micro-batches by a merge, over ranks by one collective."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.types import Dimensions, Mask, Number


class Moments(NamedTuple):
    """The count, the mean and the sum of squared deviations of live elements.

    ``squares`` is the variance times ``count`` of a population, and times ``count - 1`` where it is unbiased. Numbers,
    or float64 tensors as ``masked_moments`` returns them.

    Example:
        >>> masked_moments(torch.tensor([[1.0, 3.0]])).mean
        tensor(2., dtype=torch.float64)
    """

    count: Number
    mean: Number
    squares: Number


class Local(NamedTuple):
    """The moments of the elements of this call, with the gaps that they were made from; float64, dimensions kept."""

    count: Tensor
    base: Tensor
    centre: Tensor
    gap: Tensor
    squares: Tensor

    def mean(self) -> Tensor:
        return torch.where(self.count > 0, self.base + self.centre, 0.0)


def local_moments(x: Tensor, live: Tensor, dim: tuple[int, ...]) -> Local:
    """Computes the moments along ``dim``, differentiable in ``x``."""
    # Measured from the smallest live element, because equal elements are then exactly 0. x - mean may leave 1e-17, and
    # a division by that spread makes 1 of it where eps is 0.
    wide = x.double().contiguous()  # torch adds in the order of memory
    count = live.sum(dim, keepdim=True)
    base = torch.where(live, wide.detach(), torch.inf).amin(dim, keepdim=True) if x.numel() else wide.new_zeros(())
    offset = torch.where(live, wide - base, 0.0)
    # sum, not nansum, because the caller must see a NaN in a live element.
    centre = offset.sum(dim, keepdim=True) / count.clamp(min=1)
    gap = torch.where(live, offset - centre, 0.0)
    return Local(count, base, centre, gap, (gap * gap).sum(dim, keepdim=True))


def dimensions(caller: str, dim: Dimensions, count: int) -> tuple[int, ...]:
    """Returns ``dim`` as a tuple, all ``count`` dimensions for None; refuses what does not name dimensions of ``x``."""
    if dim is None:
        return tuple(range(count))
    dims = tuple(checks.integer(caller, "dim", axis) for axis in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    if any(not -count <= axis < count for axis in dims) or len({axis % count for axis in dims}) < len(dims):
        raise ValueError(
            f"{caller}: dim must name dimensions of x, each once, from {-count} to {count - 1}; got {dim!r}"
        )
    return dims


def live_elements(x: Tensor, mask: Mask | None) -> Tensor:
    """Returns a checked mask as a contiguous bool, of all elements where it is None."""
    if mask is None:
        return torch.ones_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
    return (mask != 0).contiguous()


@torch.no_grad()
def masked_moments(
    x: Tensor,
    mask: Mask | None = None,
    *,
    dim: Dimensions = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Moments:
    r"""Counts, averages and squares the live elements, so that a batch in parts is normalised as a whole.

    ``n``,  ``mean = sum x / n``,  ``squares = sum (x - mean)^2``. ``merge_moments`` makes those of a batch from those
    of its micro-batches.

    Args:
        x: any float dtype, bool or integers; any shape.
        mask: live elements, shaped like ``x``, any pattern; None: all.
        dim: moments along these dimensions; None: of all of ``x``.
        process_group: the ranks over which the batch lies; each gets the moments of all. It takes no ``dim``.

    Returns:
        Float64 tensors: of shape ``()``, or that of ``x`` with sizes of 1 along ``dim``; not differentiable. No live
        element: zeros.

    Raises:
        TypeError: ``x`` not real, ``mask`` complex, ``process_group`` of another type. ValueError: shapes differ; this
            process is not in ``process_group``.

    Example:
        >>> first, second = (masked_moments(torch.tensor(part)) for part in ([1.0, 2.0], [3.0, 6.0]))
        >>> merge_moments([first, second]).mean
        tensor(3., dtype=torch.float64)

    Chan, Golub and LeVeque 1979.
    """
    caller = "masked_moments"
    checks_tokens.numbers(caller, "x", x)
    checks.mask(caller, mask, x.shape)
    checks.one_device(caller, "x", x, mask=mask)
    checks.no_forward_ad(caller, x)
    dims = dimensions(caller, dim, x.dim())
    local = local_moments(x, live_elements(x, mask), dims)
    parts = local.count.double(), local.mean(), local.squares
    found = Moments(*(x.reshape(()) for x in parts) if dim is None else parts)
    if process_group is None:
        return found
    if dim is not None:
        raise ValueError(f"{caller}: process_group takes the moments of all elements; leave dim out")
    return over_ranks(caller, found, process_group)


@torch.no_grad()
def merge_moments(parts: Sequence[Moments]) -> Moments:
    r"""Merges the moments of parts into those of the whole.

    ``n = sum_i n_i``,  ``mean = sum_i n_i mean_i / n``,  ``squares = sum_i squares_i + n_i (mean_i - mean)^2``.

    Args:
        parts: at least one, as ``masked_moments`` returns them, all of one shape.

    Returns:
        Moments of the same shape: float64 tensors.

    Raises:
        TypeError: ``parts`` is no sequence of moments. ValueError: it is empty, or shapes differ.

    Example:
        >>> merge_moments([Moments(2, 1.5, 0.5), Moments(2, 4.5, 4.5)]).squares
        tensor(14., dtype=torch.float64)

    Chan, Golub and LeVeque 1979.
    """
    caller = "merge_moments"
    if not isinstance(parts, (tuple, list)) or isinstance(parts, Moments):
        raise TypeError(f"{caller}: parts must be a list of moments, got {type(parts).__name__}")
    if not parts:
        raise ValueError(f"{caller}: parts is empty, expected the moments of at least one part")
    checked = [_tensors(caller, "parts", part) for part in parts]
    shapes = {x.shape for part in checked for x in part}
    if len(shapes) > 1:
        raise ValueError(f"{caller}: parts must all have one shape, got {sorted(map(tuple, shapes))}")
    columns = [torch.stack(x) for x in zip(*checked, strict=True)]
    return _merged(*columns)


def _merged(count: Tensor, mean: Tensor, squares: Tensor) -> Moments:
    """Merges moments along the first dimension."""
    # Measured from the smallest mean, as the elements are from the smallest one: equal parts merge exactly. The mean of
    # a part without elements is no number of the batch.
    filled = count > 0
    base = torch.where(filled, mean, torch.inf).amin(0)
    offset = torch.where(filled, mean - base, 0.0)
    total = count.sum(0)
    centre = (count * offset).sum(0) / total.clamp(min=1)
    gap = torch.where(filled, offset - centre, 0.0)
    spread = torch.where(filled, squares, 0.0).sum(0) + (count * gap * gap).sum(0)
    return Moments(total, torch.where(total > 0, base + centre, 0.0), spread)


def _tensors(caller: str, name: str, moments: Moments) -> list[Tensor]:
    """Returns count, mean and squares as float64 tensors; refuses anything else than three numbers or tensors."""
    if not isinstance(moments, tuple) or len(moments) != 3:
        raise TypeError(
            f"{caller}: {name} must hold count, mean and squares, as masked_moments returns them, got "
            f"{type(moments).__name__}"
        )
    found = []
    for field, x in zip(Moments._fields, moments, strict=True):
        if isinstance(x, torch.Tensor):
            checks_tokens.numbers(caller, f"{name}.{field}", x)
            if x.dtype in (torch.float16, torch.bfloat16):
                raise TypeError(f"{caller}: {name}.{field} has dtype {x.dtype}, expected float64: 16 bits skip counts")
            checks.no_gradient(caller, **{f"{name}.{field}": x})
        else:
            x = checks.finite(caller, f"{name}.{field}", x)
            if field != "mean" and x < 0:
                raise ValueError(f"{caller}: {name}.{field} must not be negative, got {x}")
            x = torch.zeros((), dtype=torch.float64, device="cpu") + x
        found.append(x.double())
    return found


def given_moments(caller: str, moments: Moments, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the caller's moments as float64 tensors on the device of ``like``, each of ``shape`` or ``()``."""
    found = _tensors(caller, "moments", moments)
    for field, x in zip(Moments._fields, found, strict=True):
        if x.dim():
            checks.shape(caller, f"moments.{field}", x, shape)
        checks.beside(caller, f"moments.{field}", x, like)
        if x.dim() and x.device != like.device:
            raise RuntimeError(f"{caller}: moments.{field} is on {x.device}, the data on {like.device}; move it")
    count, mean, squares = found
    return count, mean, squares


def over_ranks(caller: str, moments: Moments, group: "torch.distributed.ProcessGroup") -> Moments:
    """Returns the merged moments of all ranks, in the order of the ranks, with the same bits on each of them."""
    distributed = torch.distributed
    if not isinstance(group, distributed.ProcessGroup) and group is not distributed.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"{caller}: process_group must be a torch.distributed.ProcessGroup, such as mesh.get_group(), "
            f"got {type(group).__name__}"
        )
    if distributed.get_rank(group) < 0:
        raise ValueError(f"{caller}: this process is not in process_group")
    mine = torch.stack(_tensors(caller, "moments", moments))
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, mine, group=group)
    return _merged(*torch.stack(parts, 1))
