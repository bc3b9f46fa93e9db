"""The gradients of a head, summed over chunks."""

import torch

from rlkernels.linear.memory import empty


class Gradients:
    """Sums of the gradients of hidden states, weight and bias over chunks; None for what is frozen.

    Args:
        needs: which of the three get a gradient. backend: asked for memory.
        keep_wide: keep the gradient of hidden states in the dtype of results, because it is scaled once more.
    """

    def __init__(self, head, needs, backend, keep_wide=False):
        self.head, self.needs = head, needs
        hidden, weight, real = head.hidden, head.weight, head.result_dtype()
        # What is scaled once more or summed over ranks stays fp32: a second rounding would add its error, and fp16
        # would underflow before the loss scale arrives.
        wide = keep_wide or head.shard is not None
        self.hidden = (
            torch.zeros(hidden.shape, dtype=real if wide else hidden.dtype, device=hidden.device) if needs[0] else None
        )
        # fp32 whatever the weight is: accumulated over 1024 chunks in bf16 the gradient is 3.7 % off.
        self.weight, self.first = empty(weight.shape, real, weight.device, backend) if needs[1] else None, True
        self.waiting = []  # positions and hidden states of the rows whose gradients the projection has collected
        self.bias = torch.zeros(weight.shape[:1], dtype=real, device=weight.device) if needs[2] else None

    def add(self, projection, rows, dlogits, logits, hidden):
        """Adds what the gradient ``dlogits`` of the selected rows gives, now or together with that of later rows.

        Overwrites ``dlogits`` and ``logits``.
        """
        self.waiting.append((rows.index, hidden[: len(rows)]))
        collected = projection.collect(dlogits)
        if collected is not None:
            self._multiply(projection, collected, logits)

    def finish(self, projection):
        """Adds what the gradients that still wait give."""
        if self.waiting:
            self._multiply(projection, projection.collected(), None)

    def _multiply(self, projection, dlogits, logits):
        index, hidden = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*self.waiting, strict=True))
        self.waiting.clear()
        dhidden = projection.backward(dlogits, logits, hidden, self.needs[0], self.weight, self.bias, self.first)
        self.first = False
        if dhidden is not None:
            self.hidden[index] = dhidden.to(self.hidden.dtype)

    def summed(self):
        """Returns the three gradients in the dtype that they were summed in; None for what is frozen."""
        if self.first and self.weight is not None:
            self.weight.zero_()
        if self.hidden is not None and self.head.shard is not None:
            torch.distributed.all_reduce(self.hidden, group=self.head.shard.process_group())
        return self.hidden, self.weight, self.bias

    def rounded(self):
        """Returns the three gradients in the dtypes of a registered op; an empty tensor for what is frozen."""
        hidden, weight = self.head.hidden, self.head.weight
        return tuple(
            like.new_empty(0) if gradient is None else gradient.to(like.dtype)
            for gradient, like in zip(self.summed(), (hidden, weight, weight), strict=True)
        )
