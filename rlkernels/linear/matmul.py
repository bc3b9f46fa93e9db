"""The three products of a head, ``hidden weight^T`` and its two gradients, with the accumulator kept, on each device.

cuBLAS and torch's CPU libraries do the work where they keep fp32 and are not behind. A CPU library hands a 16-bit
product out in 16 bits: there bf16 goes to our own product, and what is left is widened, one block of the vocabulary at
a time. fp16 so takes half the time of torch's fp32 products of the same blocks (0.47 to 0.60 on one thread of a Zen 5,
from 64 rows on).
"""

import torch

from rlkernels.backends import cpu_matmul
from rlkernels.backends.protocol import real_dtype

BLOCK_BYTES = 16 * 2**20
"""The part of the weight that is widened at a time."""


def products(weight, logits_dtype):
    """The products of this head for logits of this dtype."""
    if weight.device.type != "cpu":
        return Accelerated(weight)
    if logits_dtype == weight.dtype == real_dtype(weight.dtype):
        return Native(weight) if weight.dtype == torch.float32 and cpu_matmul.fp32_preferred() else Plain(_rows(weight))
    if weight.dtype == torch.bfloat16 and logits_dtype in (torch.float32, torch.bfloat16) and cpu_matmul.available():
        return Native(weight if logits_dtype == torch.float32 else _rows(weight))
    return Widened(_rows(weight))


def _rows(weight):
    """The weight with each row side by side in memory: torch's library adds in another order where columns are (seen
    without AVX-512).
    """
    return weight if weight.stride(-1) == 1 or weight.shape[-1] == 1 else weight.contiguous()


class Plain:
    """Everything in one dtype that is its own accumulator."""

    extra_bytes = 0  # per logit, beside the logits themselves
    gradient_dtype = None  # in which the gradient of the logits is taken, where it is not that of the logits

    def __init__(self, weight):
        self.weight = weight.resolve_neg()  # our own products go by the address, where a pending negation does not show

    def logits(self, hidden, out):
        """``hidden weight^T`` into ``out``."""
        torch.mm(hidden, self.weight.t(), out=out)

    def gradients(self, dlogits, hidden, want_hidden, dweight, first):
        """Adds to ``dweight`` (None: frozen), or fills it at ``first``; returns the gradient of ``hidden`` (None: not
        wanted).
        """
        if dweight is not None:
            dweight.addmm_(dlogits.t(), hidden, beta=0 if first else 1)
        return dlogits @ self.weight if want_hidden else None


class Native(Plain):
    """Our own on a CPU with instructions for it: products of bf16 or of fp32 numbers, sums in fp32."""

    def logits(self, hidden, out):
        if out.dtype == torch.float32:
            cpu_matmul.mm(hidden, self.weight.t(), out)
        else:
            torch.mm(hidden, self.weight.t(), out=out)

    def gradients(self, dlogits, hidden, want_hidden, dweight, first):
        dhidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if want_hidden else None
        if want_hidden:
            cpu_matmul.mm(dlogits, self.weight, dhidden)
        if dweight is not None:
            cpu_matmul.mm(dlogits.t(), hidden, dweight, accumulate=not first)
        if dlogits.dtype != self.weight.dtype:
            cpu_matmul.add_what_rounding_lost(dlogits, self.weight, hidden, dhidden, dweight)
        return dhidden


class Widened(Plain):
    """16-bit operands, or 16-bit logits, on a CPU: blocks of the weight in fp32.

    The products of blocks are our own where those of fp32 are: a row's bits then depend neither on the other rows nor
    on the number of threads.
    """

    def __init__(self, weight):
        super().__init__(weight)
        self.own = real_dtype(weight.dtype) == torch.float32 and cpu_matmul.fp32_preferred()

    def _multiply(self, a, b, out, accumulate=False):
        if self.own:
            cpu_matmul.mm(a, b, out, accumulate)
        else:
            out.addmm_(a, b, beta=1 if accumulate else 0)

    def _blocks(self):
        real = real_dtype(self.weight.dtype)
        rows = max(1, BLOCK_BYTES // (self.weight.shape[1] * real.itemsize))
        one = (
            None
            if self.weight.dtype == real
            else self.weight.new_empty(min(rows, self.weight.shape[0]), self.weight.shape[1], dtype=real)
        )
        for start in range(0, self.weight.shape[0], rows):
            part = self.weight[start : start + rows]
            # In one place: the caller holds on to a block while it asks for the next.
            yield slice(start, start + rows), part if one is None else one[: part.shape[0]].copy_(part)

    def logits(self, hidden, out):
        hidden = hidden.to(real_dtype(hidden.dtype))
        for block, weight in self._blocks():
            if out.dtype == weight.dtype:
                self._multiply(hidden, weight.t(), out[:, block])
            else:
                wide = hidden.new_empty(hidden.shape[0], weight.shape[0])
                self._multiply(hidden, weight.t(), wide)
                out[:, block].copy_(wide)

    def gradients(self, dlogits, hidden, want_hidden, dweight, first):
        real = real_dtype(self.weight.dtype)
        hidden = hidden.to(real)
        dhidden = torch.zeros_like(hidden) if want_hidden else None
        for block, weight in self._blocks():
            d = dlogits[:, block].to(real)
            if want_hidden:
                self._multiply(d, weight, dhidden, accumulate=True)
            if dweight is not None:
                self._multiply(d.t(), hidden, dweight[block], accumulate=not first)
        return dhidden


class Accelerated(Plain):
    """Matrix units take 16-bit operands and give fp32: the gradient of the logits is rounded to them once, sums and
    results are kept.

    fp16 ends at 6e-8: whoever makes a gradient before its loss scale is known (``chunked_loss``) brings it near 1
    first.
    """

    def __init__(self, weight):
        super().__init__(weight)
        if weight.element_size() < 4:
            self.extra_bytes, self.gradient_dtype = weight.element_size(), weight.dtype

    def logits(self, hidden, out):
        if out.dtype == self.weight.dtype:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)

    def gradients(self, dlogits, hidden, want_hidden, dweight, first):
        dlogits = dlogits.to(self.weight.dtype)
        if dweight is not None and dweight.dtype == hidden.dtype:
            dweight.addmm_(dlogits.t(), hidden, beta=0 if first else 1)
        elif dweight is not None:
            torch.addmm(dweight, dlogits.t(), hidden, out_dtype=dweight.dtype, beta=0 if first else 1, out=dweight)
        if not want_hidden:
            return None
        real = real_dtype(self.weight.dtype)
        return dlogits @ self.weight if self.weight.dtype == real else torch.mm(dlogits, self.weight, out_dtype=real)
