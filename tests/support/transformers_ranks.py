"""One of two processes: models of transformers that FSDP2 or tensor parallelism has cut, under our losses.

``python transformers_ranks.py RANK RENDEZVOUS FOLDER`` runs every case and prints ``{case: complaint or null}``.
The truth is the same model in one process, with its own logits. FOLDER holds a model to be loaded under ``tp_plan``.
"""

import datetime
import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers_runs import batch, build, own_logprobs

import rlkernels
from rlkernels.integrations import transformers as ours

IDS, MASK = batch("right")
LABELS = torch.where(MASK.bool(), IDS, -100)
TOKENS = (LABELS[:, 1:] != -100).sum()
"""Of the two sequences, which are of different lengths: each rank has one of them under FSDP2."""
WEIGHTS = torch.linspace(-1, 1, 16).view(2, 8)
EVEN = {"vocab_size": 98}
"""A vocabulary that two ranks halve; 97 is what the others have."""


def own_loss(model, rows=slice(None)):
    """The model's own loss, without our logits where it is attached."""
    inputs = {"input_ids": IDS[rows], "attention_mask": MASK[rows], "labels": LABELS[rows]}
    return model(**inputs, num_items_in_batch=TOKENS).loss


def function_loss(model, rows=slice(None)):
    outputs = model(input_ids=IDS[rows], attention_mask=MASK[rows])
    return ours.compute_loss_func(outputs, LABELS[rows], TOKENS)


def weighted_logprobs(model, rows=slice(None)):
    return (ours.token_logprobs(model, IDS[rows], MASK[rows]) * WEIGHTS[rows]).sum()


def dense(weighted, **options):
    """Returns loss and gradients of one process, by name."""
    model = build(**options).train()
    loss = (own_logprobs(model, IDS, MASK) * WEIGHTS).sum() if weighted else own_loss(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(loss, model, truth, factor=1.0):
    """Raises where the loss, or a gradient times ``factor``, is not that of one process."""
    torch.testing.assert_close(loss.detach(), truth[0], rtol=1e-5, atol=1e-5)
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == truth[1].keys(), found.keys() ^ truth[1].keys()
    for name, gradient in truth[1].items():
        gap = ((found[name] * factor - gradient).norm() / gradient.norm()).item()
        assert gap < 1e-5, f"the gradient of {name} differs by {gap:.1e} of its length"


def sharded(rank, mesh, units, options=None, **keywords):
    """Returns a model in FSDP2: its layers, or its layers and its head, are units beside the root, or nothing is."""
    model = build(**options or {}).train()
    for layer in model.model.layers if units != "root" else ():
        fully_shard(layer, mesh=mesh, **keywords)
    if units == "head":
        fully_shard(model.lm_head, mesh=mesh, **keywords)
    return fully_shard(model, mesh=mesh, **keywords)


def divisor(rank, mesh):
    """Returns by what FSDP2 over gloo divides the sum over ranks: 2, in torch 2.8 by 1; read from a stock model."""
    model = sharded(rank, mesh, "layers")
    own_loss(model, slice(rank, rank + 1)).backward()
    gradient, truth = whole(model.lm_head.weight.grad), dense(False)[1]["lm_head.weight"]
    return min((1.0, 2.0), key=lambda n: (gradient * n - truth).norm())


def fsdp(run, units, options=None, wrong=1.0, **keywords):
    def case(rank, mesh, folder):
        model = sharded(rank, mesh, units, options, **keywords)
        assert isinstance(model, FSDPModule)
        if run is not weighted_logprobs:
            ours.attach(model)
        loss = run(model, slice(rank, rank + 1)) * wrong
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        compare(total, model, dense(run is weighted_logprobs, **options or {}), divisor(rank, mesh))

    return case


def tensor_parallel(run):
    def case(rank, mesh, folder):
        model = build().train()
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
        assert model.lm_head.weight.to_local().shape[0] == 49 - rank
        if run is not weighted_logprobs:
            ours.attach(model)
        loss = run(model)
        loss.backward()
        compare(loss, model, dense(run is weighted_logprobs))

    return case


def tp_plan(run):
    def case(rank, mesh, folder):
        import transformers

        model = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").train()
        head = model.lm_head
        forward = vars(head).get("forward")
        assert isinstance(head.weight, DTensor) and head.weight.to_local().shape[0] == 49
        if run is not weighted_logprobs:
            ours.attach(model)
        loss = run(model)
        loss.backward()
        compare(loss, model, dense(run is weighted_logprobs, **EVEN))
        with torch.no_grad():  # the head's own again, whether attached or not
            own = own_logprobs(model, IDS, MASK)
            torch.testing.assert_close(own, own_logprobs(build(**EVEN), IDS, MASK), rtol=1e-5, atol=1e-5)
        ours.detach(model)
        assert vars(head).get("forward") is forward

    return case


def vocabulary_over_ranks(rank, mesh, folder):
    """Each rank holds its rows of the head alone, and the group reduces: 49 and 48 of 97."""
    model = build().train()
    start, end = ((0, 49), (49, 97))[rank]
    head = ours.hidden_and_head(model, input_ids=IDS, attention_mask=MASK)
    shard = {"weight": model.lm_head.weight[start:end], "vocab_start": start, "valid_vocab": 97, "chunk_tokens": 5}
    targets = rlkernels.shift_targets(LABELS)
    loss = rlkernels.linear_sft_loss(**{**head, **shard}, targets=targets, process_group=mesh.get_group())
    loss.backward()
    weight = model.lm_head.weight.grad
    assert not weight[:start].any() and not weight[end:].any()
    dist.all_reduce(weight)
    compare(loss, model, dense(False))


def released(run):
    def case(rank, mesh, folder):
        model = sharded(rank, mesh, "head")
        if run is not weighted_logprobs:
            ours.attach(model)
        try:
            run(model, slice(rank, rank + 1))
        except RuntimeError as error:
            assert "reshard_after_forward=False" in str(error), error
        else:
            raise AssertionError("a head that was released is not noticed")

    return case


def one_percent_of_error(rank, mesh, folder):
    try:
        fsdp(own_loss, "layers", wrong=1.01)(rank, mesh, folder)
    except AssertionError:
        return
    raise AssertionError("one percent of error is not noticed")


KEPT = {"reshard_after_forward": False}
CASES = {
    "FSDP2, attach": fsdp(own_loss, "layers"),
    "FSDP2, compute_loss_func": fsdp(function_loss, "layers"),
    "FSDP2, token_logprobs": fsdp(weighted_logprobs, "layers"),
    "FSDP2, one percent of error": one_percent_of_error,
    "FSDP2, tied weights, attach": fsdp(own_loss, "layers", {"tie_word_embeddings": True}),
    "FSDP2, tied weights, token_logprobs": fsdp(weighted_logprobs, "layers", {"tie_word_embeddings": True}),
    "FSDP2, one unit, attach": fsdp(own_loss, "root"),
    "FSDP2, one unit, token_logprobs": fsdp(weighted_logprobs, "root"),
    "FSDP2, the head a unit that stays, attach": fsdp(own_loss, "head", **KEPT),
    "FSDP2, the head a unit that stays, token_logprobs": fsdp(weighted_logprobs, "head", **KEPT),
    "FSDP2, the head a unit that is released, attach": released(own_loss),
    "FSDP2, the head a unit that is released, token_logprobs": released(weighted_logprobs),
    "tensor parallel head, attach": tensor_parallel(own_loss),
    "tensor parallel head, compute_loss_func": tensor_parallel(function_loss),
    "tensor parallel head, token_logprobs": tensor_parallel(weighted_logprobs),
    "tp_plan, attach": tp_plan(own_loss),
    "tp_plan, token_logprobs": tp_plan(weighted_logprobs),
    "process_group": vocabulary_over_ranks,
}


def main(rank, rendezvous, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))  # read by from_pretrained
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, case in CASES.items():
        try:
            found[name] = case(rank, mesh, folder)
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
