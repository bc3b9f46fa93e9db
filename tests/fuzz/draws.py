"""Random numbers, shapes and layouts.

All that a trial draws comes from here: its seed then says everything about it.
"""

import math
import random

import numpy
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS = (
    torch.bool,
    torch.bool,
    torch.bool,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.float32,
    torch.bfloat16,
    torch.float64,
)
NAN, INF = math.nan, math.inf


class Draw(random.Random):
    """The randomness of one trial.

    ``floats``: the dtypes that the backend at work takes for rows of logits; ``small``: no large vocabulary.
    """

    def __init__(self, seed, floats=FLOATS, small=False):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(self.getrandbits(62))
        self.floats, self.small = floats, small

    def flag(self, chance):
        return self.random() < chance

    def dtype(self):
        """Half of them float32: the other dtypes share most of the code."""
        return torch.float32 if self.flag(0.4) else self.choice(self.floats)

    def normal(self, shape, dtype=torch.float64, scale=1.0):
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype)

    def uniform(self, shape, low=0.0, high=1.0, dtype=torch.float64):
        return (torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low).to(dtype)

    def integers(self, low, high, shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def coins(self, shape, chance):
        return torch.rand(shape, generator=self.generator) < chance

    def among(self, shape, values, dtype=torch.float64):
        """Each element one of ``values``."""
        return torch.tensor(values, dtype=dtype)[self.integers(0, len(values), shape)]

    def number(self, value):
        """A number, or the same as a tensor of shape ``()``."""
        return torch.tensor(value, dtype=self.choice((torch.float32, torch.float64))) if self.flag(0.3) else value

    def dressed(self, name, x):
        """Now and then a number as numpy or torch have it, and offsets as a list."""
        if type(x) not in (int, float) and name != "cu_seqlens" or self.flag(0.95):
            return x
        if name == "cu_seqlens":
            return x.tolist()
        kinds = (
            (numpy.float64, numpy.array, lambda x: torch.tensor(x, dtype=torch.float64))
            if type(x) is float
            else (numpy.int64, torch.tensor)
        )
        # A tensor of temperatures has one per row.
        return self.choice(kinds[:-1] if name == "temperature" else kinds)(x)

    def masked(self, live):
        """``live`` as a mask of some dtype and layout."""
        return self.laid_out(live.to(self.choice(MASKS)), keep=True)

    def with_garbage(self, x, live, chance=0.5):
        """``x`` with something that nobody may look at where it is not live."""
        return torch.where(live, x, self.choice((NAN, INF, -INF, 6e4))).to(x.dtype) if self.flag(chance) else x

    def column(self, live, scale=1.0, keep=True):
        """A float tensor shaped like ``live``, of any dtype and layout, with garbage at dead places."""
        x = self.normal(live.shape, self.choice((torch.float32, *FLOATS)), scale)
        return (
            self.with_garbage(self.laid_out(x), live)
            if not keep
            else self.laid_out(self.with_garbage(x, live), keep=True)
        )

    def laid_out(self, x, keep=False):
        """``x`` in a random layout, between garbage.

        Without ``keep`` the values may become others of the same kind: rows repeat, memory overlaps.
        """
        layouts = [torch.clone, self._offset]
        if x.dim():
            layouts += [self._stepped, self._sliced, self._permuted, self._stepped, self._sliced]
            if x.numel() and not keep:
                layouts += [self._expanded, self._strided]
        return self.choice(layouts)(x)

    def _offset(self, x):
        return self._inside(x, (x.numel() + 3,), lambda parent: parent[3:].view(x.shape))

    def _stepped(self, x):
        d = self.randrange(x.dim())
        return self._inside(
            x,
            [2 * n + 1 if i == d else n for i, n in enumerate(x.shape)],
            lambda parent: parent[tuple(slice(1, None, 2) if i == d else slice(None) for i in range(x.dim()))],
        )

    def _sliced(self, x):
        before, after = ([self.randint(0, 2) for _ in x.shape] for _ in range(2))
        return self._inside(
            x,
            [n + a + b for n, a, b in zip(x.shape, before, after, strict=True)],
            lambda parent: parent[tuple(slice(a, a + n) for a, n in zip(before, x.shape, strict=True))],
        )

    def _permuted(self, x):
        order = list(range(x.dim()))
        self.shuffle(order)
        return self._inside(
            x, [x.shape[i] for i in order], lambda parent: parent.permute([order.index(i) for i in range(x.dim())])
        )

    def _expanded(self, x):
        return x.narrow(self.randrange(x.dim()), 0, 1).clone().expand(x.shape)

    def _strided(self, x):
        """Any strides: elements may share memory, and rows may run through each other."""
        strides, offset = [self.choice((0, 1, 1, 2, 3, 5)) for _ in x.shape], self.randint(0, 3)
        storage = x.flatten()[
            torch.arange(offset + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1) % x.numel()
        ]
        return storage.as_strided(x.shape, strides, offset)

    def _inside(self, x, shape, view):
        """``x`` copied into a view of a parent of garbage: what is read beside it shows."""
        if x.dtype == torch.bool:
            parent = self.coins(shape, 0.5)
        else:
            parent = torch.full(
                shape, NAN if x.dtype.is_floating_point else torch.iinfo(x.dtype).max // 2, dtype=x.dtype
            )
        view(parent).copy_(x)
        return view(parent)


def leaf(x, requires_grad=True):
    """``x`` as a leaf in the layout that it has."""
    return x.detach().requires_grad_(requires_grad)


def wide(x):
    """A float64 leaf of the same values."""
    return x.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_()
