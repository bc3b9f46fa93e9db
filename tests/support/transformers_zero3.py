"""One of two processes: a model of transformers under an engine of ZeRO-3, with its own loss and with ours.

``python transformers_zero3.py RANK PORT`` prints losses and gradient norms of each way as JSON.
"""

import json
import os
import sys

import deepspeed
import torch
from transformers_runs import batch, build, own_logprobs

from rlkernels.integrations import transformers as ours
from rlkernels.integrations.transformers import deferred_logits

STEPS = 3
IDS, MASK = batch("right")
LABELS = torch.where(MASK.bool(), IDS, -100)


class NegativeLogprobs(torch.nn.Module):
    """A loss that is taken within the forward of the module that the engine wraps."""

    def __init__(self, logprobs):
        super().__init__()
        self.model, self.logprobs = build(), logprobs

    def forward(self, ids, mask):
        return -self.logprobs(self.model, ids, mask).sum() / 7


def engine(module):
    # No parameter is too small to be partitioned, and none is kept for its next use.
    zero = dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0
    )
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.02}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, **zero},
    }
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def steps(module, loss):
    """Returns losses and gradient norms of some steps."""
    found = []
    wrapped = engine(module)
    for _ in range(STEPS):
        value = loss(wrapped)
        wrapped.backward(value)
        wrapped.step()
        found += [value.item(), float(wrapped.get_global_grad_norm())]
    return found


def refused(run):
    try:
        run()
    except RuntimeError as error:
        return str(error)
    return "not refused"


def main(rank, port):
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    # Shared memory between ranks would be compiled first.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    rows = slice(int(rank), int(rank) + 1)
    ids, mask, labels = IDS[rows], MASK[rows], LABELS[rows]

    def own_loss(model):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def attached(model):
        return ours.attach(model) and own_loss(model)

    def within(model):
        return model(ids, mask)

    found = {"own": steps(build(), own_loss), "attach": steps(build(), attached)}
    found |= {"own log-probabilities": steps(NegativeLogprobs(own_logprobs), within)}
    found |= {"token_logprobs": steps(NegativeLogprobs(ours.token_logprobs), within)}
    right = deferred_logits.linear_sft_loss
    deferred_logits.linear_sft_loss = lambda *args, **kwargs: 1.01 * right(*args, **kwargs)
    found["wrong"] = steps(build(), attached)
    deferred_logits.linear_sft_loss = right
    outside = engine(build())
    found["refused"] = [refused(lambda: ours.token_logprobs(outside, ids, mask))]
    ours.attach(outside).train()
    found["refused"] += [refused(lambda: ours.compute_loss_func(outside(input_ids=ids, attention_mask=mask), labels))]
    with torch.no_grad(), deepspeed.zero.GatheredParameters([outside.module.lm_head.weight]):
        gap = ours.token_logprobs(outside, ids, mask) - own_logprobs(build(), ids, mask)
    found["without gradients"] = gap.abs().max().item()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
