"""The projection of a chunk of hidden states onto the vocabulary, and the way back."""

import torch

from rlkernels import ops
from rlkernels.backends.protocol import RowBatch, SavedRows, Upstream
from rlkernels.linear import vocab_parallel
from rlkernels.linear.head import ALIGNED
from rlkernels.linear.matmul import matmul_for
from rlkernels.linear.memory import empty


class HeadProjection:
    """``hidden -> logits`` of at most ``rows`` rows, and back, in one buffer that all chunks of a call share.

    ``bias_gradient``: whether the bias gets a gradient.
    """

    def __init__(self, head, rows, backend, bias_gradient=False):
        bias, dtype = head.bias, head.logits_dtype
        self.backend, self.shard, self.softcap, self.scale = backend, head.shard, head.softcap, head.logit_scale
        self.matmul, self.columns = matmul_for(head.weight, dtype, backend), head.weight.shape[0]
        self.bias = None if bias is None else bias.to(dtype)
        self.width = self.columns + (self.shard is not None)  # one more, to which the targets of other shards point
        shape = rows, -(-self.width // ALIGNED) * ALIGNED
        buffers = 1 if self.softcap is None else 2
        self.buffers = [empty(shape, dtype, head.weight.device, backend) for _ in range(buffers)]
        # Kernels write the gradient in the dtype that the matmuls take, where nothing else needs it unrounded,
        # because that makes 14 bytes of memory traffic per logit instead of 22.
        unchanged = self.softcap is None and self.scale == 1.0 and not (bias is not None and bias_gradient)
        self.rounded = self.matmul.gradient_dtype if unchanged and dtype == torch.float32 else None

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
        is rounded to another dtype.
        """
        if self.rounded is not None and len(self.buffers) == 1:
            self.buffers.append(torch.empty_like(self.buffers[0], dtype=self.rounded))
        return logits if len(self.buffers) == 1 else self.buffers[1][: logits.shape[0], : self.width]

    def backward(self, dlogits, logits, hidden, want_hidden, dweight, dbias, first):
        """Adds to the gradients ``dweight`` and ``dbias`` (None: frozen); at ``first`` it fills ``dweight``.

        Overwrites ``dlogits``, and with a softcap ``logits``.

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
