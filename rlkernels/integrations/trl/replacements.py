"""The objects that stand in TRL's seams: each decides whether a call is ours, and counts it."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlkernels import ops
from rlkernels.integrations._patching import Host, Replacement
from rlkernels.integrations.trl import functions
from rlkernels.integrations.trl.functions import OUTPUTS

DEVICES = ("cpu", "cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def outside(name: str, x: Tensor) -> str | None:
    """Returns the reason why a tensor of logits, hidden states or a head is not ours, or None."""
    if isinstance(x, DTensor):
        return "a DTensor, call full_tensor() first"
    if x.device.type not in DEVICES:
        return f"device {x.device.type}"
    return None if x.dtype in FLOATS else f"{name} is {x.dtype}"


def head_outside(**tensors: Tensor | None) -> str | None:
    """Returns the reason why hidden states and heads are not ours, or None."""
    for name, x in tensors.items():
        if hasattr(x, "ds_id"):
            return "the head is sharded by ZeRO-3, and its backward would read it after TRL released it"
        reason = None if x is None else outside(name, x)
        if reason is not None:
            return reason
    return None


class FusedHead(Replacement):
    """``_ChunkedLogProbFunction``: the hidden states and the head go in, no ``[N, V]`` tensor of logits comes to be.

    Logits are accumulated and kept in fp32, where TRL rounds them to the dtype of the hidden states; ``logits_dtype``
    of the patch rounds them, too.
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
        """Computes what ``functions.ChunkedLogProbFunction`` computes, or hands the call over."""
        head = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
        return self._serve(head, outputs, (*head, outputs))

    def _serve(self, head, outputs, given):
        """Serves a call with the arguments ``head`` and ``outputs``; ``given``: what the original takes."""
        hidden, weight, bias, *_ = head
        functions.gathered("weight", weight, hidden)
        reason = head_outside(hidden=hidden, weight=weight, bias=bias)
        unknown = set(outputs) - {*OUTPUTS, "log_probs"}
        reason = f"unknown outputs {sorted(unknown)}" if reason is None and unknown else reason
        if reason is not None:
            return self.delegate(reason).apply(*given)
        dtype = self.host.options.get("logits_dtype")
        result = functions.ChunkedLogProbFunction.apply(*head, outputs, logits_dtype=dtype)
        self.served()
        return tuple(result)


class FusedHeadOf14(FusedHead):
    """The same in TRL 1.13 and 1.14, whose result is ``(logprobs, entropy)``."""

    def apply(
        self, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        """Computes ``(logprobs, entropy)``, both with a gradient."""
        head = (last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
        return self._serve(head, ("entropy",), head)[:2]


class FusedHeadOf12(FusedHead):
    """The same up to TRL 1.12, without a bias. The entropy of TRL's own has no gradient there; ours has."""

    def apply(
        self, last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        """Computes ``(logprobs, entropy)``, both with a gradient."""
        of_head = (targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
        return self._serve((last_hidden, weight, None, *of_head), ("entropy",), (last_hidden, weight, *of_head))[:2]


class Divergence(Replacement):
    """``ChunkedDivergenceFunction``: the hidden states and the heads of a student and its teacher."""

    def apply(
        self,
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        beta,
        temperature=1.0,
        student_logit_scale=1.0,
        student_final_logit_softcapping=None,
        teacher_logit_scale=1.0,
        teacher_final_logit_softcapping=None,
    ):
        """Computes what ``functions.ChunkedDivergenceFunction`` computes, or hands the call over."""
        tensors = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
        numbers = (beta, temperature, student_logit_scale, student_final_logit_softcapping)
        numbers += (teacher_logit_scale, teacher_final_logit_softcapping)
        functions.gathered("student_weight", student_weight, student_hidden)
        functions.gathered("teacher_weight", teacher_weight, teacher_hidden)
        names = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
        reason = head_outside(**dict(zip(names, tensors, strict=True)))
        if reason is not None:
            return self.delegate(reason).apply(*tensors, *numbers)
        dtype = self.host.options.get("logits_dtype")
        result = functions.ChunkedDivergenceFunction.apply(*tensors, *numbers, logits_dtype=dtype)
        self.served()
        return result


def logits_outside(logits, *args, **kwargs) -> str | None:
    """Returns the reason why a call of a function over logits is not ours, or None."""
    return outside("logits", logits)


def by_contract(host: Host):
    """Returns the test of calls that belong to TRL's function: 16-bit logits on a CPU, whose bits TRL's tests demand.

    ``patch(logits_dtype=torch.float32)`` asks for ours.
    """

    def half_on_a_cpu(logits, *args, **kwargs) -> str | None:
        kept = logits.dtype in HALVES and logits.device.type == "cpu"
        if kept and host.options.get("logits_dtype") != torch.float32:
            return f"{logits.dtype} on a CPU: TRL's own bits; patch(logits_dtype=torch.float32) asks for ours"
        return None

    return half_on_a_cpu


class LogprobEntropy(Replacement):
    """``_fused_logprob_entropy``: log-probability of the index and entropy, from logits that exist."""

    def __call__(self, logits, index, temperature=1.0, row_mask=None):
        """Rows where ``row_mask`` is 0 are not read and give 0; both outputs are fp32 and carry gradients."""
        reason = outside("logits", logits)
        if reason is not None:
            return self.delegate(reason)(logits, index, temperature, row_mask)
        result = functions.selective_log_softmax_and_entropy(logits, index, True, temperature, row_mask)
        self.served()
        return result


class LogSigmoid(Replacement):
    """``nn.functional.logsigmoid`` of RewardTrainer: one value per pair, fp32; mean, margin and centring stay the
    trainer's.
    """

    def __call__(self, input):
        if not isinstance(input, Tensor) or input.device.type not in DEVICES or input.dtype not in FLOATS:
            return self.delegate(f"{getattr(input, 'dtype', type(input))} on {getattr(input, 'device', 'no device')}")(
                input
            )
        margin = input.reshape(-1).to(torch.promote_types(input.dtype, torch.float32)).contiguous()
        _, value, _ = ops.elementwise("pairwise", margin, [], ops.numbers(()), None, ops.serving("elementwise", margin))
        self.served()
        return -value.view(input.shape)  # the objective is a loss, -log sigmoid
