"""The three matmuls of a head, ``hidden weight^T`` and its two gradients, with the accumulator kept, on each device.

cuBLAS and torch's CPU libraries serve where they keep fp32 and are not slower. A CPU library rounds a 16-bit matmul to
16 bits. So bf16 goes to our own matmul there, and the other cases convert the weight to fp32, one block of the
vocabulary at a time. In fp16 that takes half the time of torch's fp32 matmul of the same blocks (0.47 to 0.60 on one
thread of a Zen 5, from 64 rows on). Processors other than x86 take that way for bf16, too. None was measured.
"""

import torch

from rlkernels.backends import cpu_matmul
from rlkernels.backends.protocol import real_dtype

BLOCK_BYTES = 16 * 2**20
"""Bytes of fp32 weight that are converted at a time."""


def matmul_for(weight, logits_dtype, backend):
    """Returns the matmuls of a head for logits of this dtype; with backend ``"eager"``, those of torch alone."""
    if weight.device.type != "cpu":
        return AcceleratorMatmul(weight)
    native = backend != "eager"
    if logits_dtype == weight.dtype == real_dtype(weight.dtype):
        if native and weight.dtype == torch.float32 and cpu_matmul.fp32_preferred():
            return NativeMatmul(weight)
        return TorchMatmul(_row_major(weight))
    narrow = weight.dtype == torch.bfloat16 and logits_dtype in (torch.float32, torch.bfloat16)
    if native and narrow and cpu_matmul.available():
        return NativeMatmul(weight if logits_dtype == torch.float32 else _row_major(weight))
    return BlockedFp32Matmul(_row_major(weight), native)


def _row_major(weight):
    """Returns the weight with each row side by side in memory, a copy where it lies in another way.

    torch's library adds in another order where columns are side by side (seen without AVX-512).
    """
    return weight if weight.stride(-1) == 1 or weight.shape[-1] == 1 else weight.contiguous()


class TorchMatmul:
    """torch's matmuls, everything in one dtype that is its own accumulator; the interface of the others."""

    extra_bytes = 0
    """Bytes per logit that a matmul needs beside the logits themselves."""
    gradient_dtype = None
    """The dtype in which ``gradients`` wants the gradient of the logits; None: that of the logits."""

    def __init__(self, weight):
        # Our own matmuls go by the address, where a pending negation does not show.
        self.weight = weight.resolve_neg()

    def logits(self, hidden, out):
        """Writes ``hidden weight^T`` into ``out``."""
        torch.mm(hidden, self.weight.t(), out=out)

    def gradients(self, dlogits, hidden, want_hidden, dweight, first):
        """Adds to ``dweight``, or fills it at ``first``; None: the weight is frozen.

        Returns:
            The gradient of ``hidden``, or None where it is not wanted.
        """
        if dweight is not None:
            dweight.addmm_(dlogits.t(), hidden, beta=0 if first else 1)
        return dlogits @ self.weight if want_hidden else None


class NativeMatmul(TorchMatmul):
    """Our own matmuls on a CPU with instructions for them: operands in bf16 or in fp32, sums in fp32."""

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


class BlockedFp32Matmul(TorchMatmul):
    """16-bit operands or 16-bit logits on a CPU: blocks of the weight are converted to fp32 (fp64 stays fp64).

    With ``native`` code the matmuls of blocks are our own where those of fp32 are. A row's bits then depend neither on
    the other rows nor on the number of threads.
    """

    def __init__(self, weight, native=True):
        super().__init__(weight)
        self.own = native and real_dtype(weight.dtype) == torch.float32 and cpu_matmul.fp32_preferred()

    def _multiply(self, a, b, out, accumulate=False):
        if self.own:
            cpu_matmul.mm(a, b, out, accumulate)
        else:
            out.addmm_(a, b, beta=1 if accumulate else 0)

    def _blocks(self):
        """Yields the columns of each block and its weight, converted."""
        real = real_dtype(self.weight.dtype)
        rows = max(1, BLOCK_BYTES // (self.weight.shape[1] * real.itemsize))
        buffer = None
        if self.weight.dtype != real:
            shape = min(rows, self.weight.shape[0]), self.weight.shape[1]
            buffer = self.weight.new_empty(shape, dtype=real)
        for start in range(0, self.weight.shape[0], rows):
            part = self.weight[start : start + rows]
            # All blocks share one buffer, because the caller still holds one block when it asks for the next: a tensor
            # per block would keep two of them alive.
            yield slice(start, start + rows), part if buffer is None else buffer[: part.shape[0]].copy_(part)

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
            dblock = dlogits[:, block].to(real)
            if want_hidden:
                self._multiply(dblock, weight, dhidden, accumulate=True)
            if dweight is not None:
                self._multiply(dblock.t(), hidden, dweight[block], accumulate=not first)
        return dhidden


class AcceleratorMatmul(TorchMatmul):
    """Matmuls of matrix units, which take 16-bit operands and give fp32.

    The gradient of the logits is rounded to 16 bits once; sums and results are kept in fp32. The smallest number of
    fp16 is 6e-8, so a gradient that is made before its loss scale is known is brought near 1 first (``chunked_loss``).
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
