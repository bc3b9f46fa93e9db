"""Layouts that torch has for a tensor of any shape, each beside numbers that show where they are read.

Those of logits are in ``reference``.
"""

import torch


def wrong(x):
    """What lies beside the numbers of a tensor: it shows where it is read."""
    return float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else 10**6


def apart(x):
    """Two elements, or two rows, never side by side."""
    parent = torch.full([2 * n + 1 for n in x.shape], wrong(x), dtype=x.dtype)
    view = parent[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def every_other(x):
    parent = torch.full((*x.shape, 2), wrong(x), dtype=x.dtype)
    parent[..., 0] = x
    return parent[..., 0]


def offset(x):
    storage = torch.full((x.numel() + 3,), wrong(x), dtype=x.dtype)
    storage[1:-2] = x.reshape(-1)
    return storage[1:-2].view(x.shape)


def overlapping(x):
    """Rows that begin one element after each other."""
    sizes = [max(n, 1) for n in x.shape]
    return x.reshape(-1)[: 1 + sum(n - 1 for n in sizes)].clone().as_strided(x.shape, (1,) * x.dim())


def long_strides_of_single_elements(x):
    strides = [7777 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return x.clone().as_strided(x.shape, strides)


LAYOUTS = {
    "every element apart": apart,
    "column of a table": every_other,
    "storage offset": offset,
    "dimensions reversed in memory": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))) if x.dim() > 1 else None
    ),
    "negative bit": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else None,
    "strides of single elements": lambda x: long_strides_of_single_elements(x) if 1 in x.shape else None,
    # Those that change the numbers.
    "expanded from one row": lambda x: x[:1].clone().expand(x.shape) if x.dim() else None,
    "expanded from one element": lambda x: (
        x.reshape(-1)[:1].clone().view((1,) * x.dim()).expand(x.shape) if x.dim() else None
    ),
    "overlapping": lambda x: overlapping(x) if x.dim() > 1 else None,
}
ORDERED = {"cu_seqlens", "spans", "reward_token_ids"}  # no offsets are alike, and no columns


def laid_out(layout, argument, x):
    """None where the layout does not exist for this argument."""
    if argument in ORDERED and layout in ("expanded from one row", "expanded from one element", "overlapping"):
        return None
    return LAYOUTS[layout](x)


def compared(call_with, name, d, layout, only=None):
    """Results and gradients of a call of ``public_calls`` with one argument (or all) in a layout, and with contiguous
    copies; how often it was laid out.
    """
    tried = 0

    def change(argument, x, dense):
        nonlocal tried
        y = laid_out(layout, argument, x) if only in (None, argument) else None
        if y is None:
            return x
        tried += 1
        return y.resolve_neg().clone(memory_format=torch.contiguous_format) if dense else y

    found = [call_with(name, d, lambda argument, x, dense=dense: change(argument, x, dense)) for dense in (False, True)]
    return *found, tried
