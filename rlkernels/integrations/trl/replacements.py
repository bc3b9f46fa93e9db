"""The functions that TRL calls, under TRL's names and conventions, each served by one public function of ours."""

import torch
from torch.distributed.tensor import DTensor

from rlkernels import ops
from rlkernels.integrations._patching import Replacement
from rlkernels.linear.token_stats import linear_token_stats
from rlkernels.logprobs import token_stats

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
DEVICES = ("cpu", "cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FusedHead(Replacement):
    """``_ChunkedLogProbFunction``: the hidden states and the head go in, no ``[N, V]`` tensor of logits comes to be.

    Logits are accumulated and kept in fp32, where TRL rounds them to the dtype of the hidden states.
    """

    def apply(
        self,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=OUTPUTS,
    ):
        """Computes ``log softmax(softcap(scale (h W + b)) / T)`` of the targets, with TRL's four optional statistics.

        Args:
            hidden, weight, bias, targets: ``[N, H]``, ``[V, H]``, ``[V]`` or None, ``[N]``.
            chunk_size: TRL's tile along the vocabulary; our chunks run along the tokens, and the result depends on
                neither.

        Returns:
            ``(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1)``, None for what ``outputs`` does not name.
            Gradients flow through the first two.
        """
        reason = self._outside(hidden, weight, bias, outputs)
        if reason is not None:
            return self.delegate(reason).apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        # The head runs in the dtype of the hidden states, as TRL's does, and outside autocast, which would round the
        # fp32 logits again.
        with torch.autocast(device, enabled=False):
            stats = linear_token_stats(
                hidden,
                weight.to(hidden.dtype),
                targets,
                bias=None if bias is None else bias.to(hidden.dtype),
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                outputs=tuple(name for name in OUTPUTS if name in outputs),
            )
        self.served()
        # Statistics are detached, as TRL's are.
        found = (getattr(stats, name) if name in outputs else None for name in OUTPUTS)
        return (stats.logprobs, *(x if x is None or x is stats.entropy else x.detach() for x in found))

    @staticmethod
    def _outside(hidden, weight, bias, outputs) -> str | None:
        if weight.numel() == 0 and hidden.shape[-1] != 0:
            expected = f"[V, {hidden.shape[-1]}]"
            raise ValueError(
                f"weight must have shape {expected}, got {tuple(weight.shape)}: gather the sharded head before the call"
            )
        if hasattr(weight, "ds_id") or (bias is not None and hasattr(bias, "ds_id")):
            return "the head is sharded by ZeRO-3, and its backward would read it after TRL released it"
        if isinstance(weight, DTensor) or isinstance(hidden, DTensor) or isinstance(bias, DTensor):
            return "a DTensor, call full_tensor() first"
        if hidden.device.type not in DEVICES:
            return f"device {hidden.device.type}"
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype not in FLOATS:
                return f"{name} is {tensor.dtype}"
        unknown = set(outputs) - {*OUTPUTS, "log_probs"}
        return f"unknown outputs {sorted(unknown)}" if unknown else None


class LogprobEntropy(Replacement):
    """``_fused_logprob_entropy``: log-probability of the index and entropy, from logits that exist."""

    def __call__(self, logits, index, temperature=1.0, row_mask=None):
        """Rows where ``row_mask`` is 0 are not read and give 0; both outputs are fp32 and carry gradients."""
        if logits.device.type not in DEVICES:
            return self.delegate(f"device {logits.device.type}")(logits, index, temperature, row_mask)
        targets = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
        stats = token_stats(logits, targets, temperature=temperature, outputs=("entropy",))
        self.served()
        return stats.logprobs, stats.entropy


class LogSigmoid(Replacement):
    """``nn.functional.logsigmoid`` of RewardTrainer: one value per pair, fp32; mean, margin and centring stay the
    trainer's.
    """

    def __call__(self, input):
        if not isinstance(input, torch.Tensor) or input.device.type not in DEVICES or input.dtype not in FLOATS:
            return self.delegate(f"{getattr(input, 'dtype', type(input))} on {getattr(input, 'device', 'no device')}")(
                input
            )
        margin = input.reshape(-1).to(torch.promote_types(input.dtype, torch.float32)).contiguous()
        _, value, _ = ops.elementwise("pairwise", margin, [], ops.numbers(()), None, ops.serving("elementwise", margin))
        self.served()
        return -value.view(input.shape)  # the objective is a loss, -log sigmoid
