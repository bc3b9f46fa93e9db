"""The projection of a chunk of hidden states onto the vocabulary, and the way back."""

import torch

from rlkernels import ops
from rlkernels.backends.protocol import RowBatch, SavedRows, Upstream
from rlkernels.linear import vocab_parallel
from rlkernels.linear.chunking import filled_up
from rlkernels.linear.head import ALIGNED
from rlkernels.linear.matmul import matmul_for
from rlkernels.linear.memory import empty


class HeadProjection:
    """``hidden -> logits`` of at most ``rows`` rows, and back, in one buffer that all chunks of a call share.

    ``bias_gradient``: whether the bias gets a gradient. ``kept``: the rows whose gradients of the logits are kept until
    they enter a matmul, where ``keeps_gradients`` holds; else those of a chunk are.
    """

    def __init__(self, head, rows, backend, bias_gradient=False, kept=0):
        bias, dtype = head.bias, head.logits_dtype
        self.backend, self.shard, self.softcap, self.scale = backend, head.shard, head.softcap, head.logit_scale
        self.matmul, self.columns = matmul_for(head.weight, dtype, backend), head.weight.shape[0]
        self.bias = None if bias is None else bias.to(dtype)
        self.width = self.columns + (self.shard is not None)  # one more, to which the targets of other shards point
        shape = rows, -(-self.width // ALIGNED) * ALIGNED
        buffers = 1 if self.softcap is None else 2
        self.buffers = [empty(shape, dtype, head.weight.device, backend) for _ in range(buffers)]
        self.rounded = _rounded(head, self.matmul, bias_gradient)
        self.rows, self.kept, self.waiting = rows, max(rows, kept), 0

    def logits(self, hidden):
        """Returns the logits of ``hidden``, in the buffer."""
        logits = self.buffers[0][: hidden.shape[0], : self.width]
        body = logits[:, : self.columns]
        self.matmul.logits(hidden, body)
        if self.bias is not None:
            body.add_(self.bias)
        if self.scale != 1.0:
            body.mul_(self.scale)
        if self.softcap is not None:
            body.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.shard is not None:
            logits[:, self.columns] = vocab_parallel.absent_logit(logits.dtype)
        return logits

    def statistics(self, logits, row_arguments, wanted):
        """Returns ``token_stats`` of whole rows; over a process group by one collective."""
        if self.shard is None:
            return ops.run("token_stats", self.backend, RowBatch(logits, *row_arguments), wanted)
        return vocab_parallel.token_stats(self.shard, self.backend, logits, *row_arguments, wanted)

    def dlogits(self, dlogp, dentropy, logits, row_arguments, saved):
        """Returns the gradient of the logits, in ``gradient_buffer``.

        ``saved``: row maximum, sum of exponentials and entropy of the rows.
        """
        out = self.gradient_buffer(logits)
        if self.shard is None:
            upstream, saved = Upstream(dlogp, dentropy), SavedRows(*saved)
            return ops.run("token_stats_backward", self.backend, upstream, RowBatch(logits, *row_arguments), saved, out)
        return vocab_parallel.token_stats_backward(
            self.shard, self.backend, dlogp, dentropy, logits, *row_arguments, *saved, out
        )

    def target_repair(self, dlogp, dentropy, dlse, logits, row_arguments, saved):
        """Returns the column and the gradient of each row's target, ``[m, 1]``, under one of the logsumexp, ``dlse``.

        ``dlogits`` gets that one subtracted from ``dlogp``, which is right everywhere but at the target. Asked before
        it, because it overwrites the logits. Over a process group the target of another shard is the column behind the
        last, which enters no matmul.
        """
        targets, temperature, ignore_index, _ = row_arguments
        live = targets != ignore_index
        if self.shard is not None:
            targets, _ = vocab_parallel.local_targets(self.shard, targets, ignore_index)
        index = torch.where(live & (targets >= 0) & (targets < self.width), targets, 0).long()[:, None]
        upstream = Upstream(dlogp, dentropy)
        made = ops.target_gradient(upstream, dlse, logits.gather(1, index), live, temperature, SavedRows(*saved))
        return index, made[:, None]

    def gradient_buffer(self, logits):
        """Returns the memory for the gradient of the logits.

        That is the memory of the logits themselves, unless the way back through the softcap needs them or the gradient
        is rounded to another dtype. Rounded gradients lie behind those that wait.
        """
        if self.rounded is not None and len(self.buffers) == 1:
            self.buffers.append(self.buffers[0].new_empty(self.kept, self.buffers[0].shape[1], dtype=self.rounded))
        if len(self.buffers) == 1:
            return logits
        return self.buffers[1][self.waiting : self.waiting + logits.shape[0], : self.width]

    def collect(self, dlogits):
        """Returns the gradients that enter the matmuls now; None while the memory holds one more chunk's."""
        self.waiting += len(dlogits)
        if self.rounded is not None and self.waiting + self.rows <= self.kept:
            return None
        return self.collected() if self.waiting > len(dlogits) else self.collected(dlogits)

    def collected(self, alone=None):
        """Returns the gradients that have waited; ``alone`` where no other one has waited beside it."""
        count, self.waiting = self.waiting, 0
        return self.buffers[1][:count, : self.width] if alone is None else alone

    def backward(self, dlogits, logits, hidden, want_hidden, dweight, dbias, first):
        """Adds to the gradients ``dweight`` and ``dbias`` (None: frozen); at ``first`` it fills ``dweight``.

        Overwrites ``dlogits``, and with a softcap ``logits``, which are those of the same rows.

        Returns:
            The gradient of ``hidden``, or None where it is not wanted.
        """
        dlogits = dlogits[:, : self.columns]
        if self.softcap is not None:
            dlogits.mul_(logits[:, : self.columns].div_(self.softcap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            dlogits.mul_(self.scale)
        if dbias is not None:
            dbias.add_(dlogits.sum(0, dtype=dbias.dtype))
        return self.matmul.gradients(dlogits, hidden, want_hidden, dweight, first)


def planned_projection(head, counts, backend, needs, keeps):
    """Returns a HeadProjection for the chunks of each of these ``counts`` of rows.

    ``needs``: which of hidden states, weight and bias get a gradient. ``keeps``: as for ``planned_stretches``.
    """
    stretches = [stretch for count in counts for stretch in head.stretches(count, keeps)]
    rows, kept = (filled_up(max(map(size, stretches), default=0)) for size in (max, sum))
    return HeadProjection(head, rows, backend, needs[2], kept)


def keeps_gradients(head, backend, needs):
    """Tells whether the gradient of the logits has memory of its own, in which it may wait for that of other chunks.

    ``needs``: which of hidden states, weight and bias get a gradient.
    """
    # Asked of planned heads alone, because on a CPU the matmuls may copy the weight.
    if not (head.planned and any(needs)) or head.shard is not None:
        return False
    return _rounded(head, matmul_for(head.weight, head.logits_dtype, backend), needs[2]) is not None


def _rounded(head, matmul, bias_gradient):
    """Returns the dtype in which kernels write the gradient of the logits, or None: that of the logits.

    It is that of the matmuls, where nothing else needs the gradient unrounded, because that makes 14 bytes of memory
    traffic per logit instead of 22.
    """
    unchanged = head.softcap is None and head.logit_scale == 1.0 and not (head.bias is not None and bias_gradient)
    return matmul.gradient_dtype if unchanged and head.logits_dtype == torch.float32 else None
