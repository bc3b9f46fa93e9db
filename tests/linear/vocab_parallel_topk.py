"""More cases of a head over a process group: a teacher of whom the likeliest tokens are known, on whichever rank."""

import math
import re

import torch
from vocab_parallel_cases import AGREEMENT, case
from vocab_parallel_disagreement import alike, error_of, served
from vocab_parallel_masks import true_divergence
from vocab_parallel_worker import Problem, assert_gradients, counted

import rlkernels as rlk

K = 6
KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.7}, "cross_entropy": {}}


def likeliest(p, k=K):
    """The teacher's ids and log-probabilities ``[..., K]``, and which of them are used; dead tokens hold rubbish."""
    draw = torch.Generator().manual_seed(12)
    logprobs, ids = (2 * torch.randn(*p.shape, p.vocab, generator=draw).double()).log_softmax(-1).topk(k)
    used = torch.rand(ids.shape, generator=draw) < 0.8
    used[0, 1], used[1, 1] = True, False  # one token of all ids, one of none: its whole mass is the rest
    logprobs = torch.where(used, logprobs, -math.inf)
    live = p.mask[..., None]
    pair = torch.where(live, ids, -7), torch.where(live, logprobs, math.nan).to(p.real)
    return pair, ids, logprobs, used


def truth_of(p, wide, kind, ids, logprobs, used):
    """The divergence of each token by the definition: the ids and, as one outcome, everything else."""
    heat = p.settings.get("temperature", torch.ones(p.shape)).double()[..., None]
    student = (p.logits(*wide) / heat).log_softmax(-1).gather(-1, ids)
    outcomes = []
    for x in (student, logprobs.to(p.real).double()):
        x = torch.where(used, x, -1e4)  # e^x is 0, and no difference is one of infinities
        outcomes.append(torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1))
    return torch.where(p.mask, true_divergence(kind, *outcomes), 0.0)


@case(
    "a {kind} from a teacher's likeliest tokens in {dtype} is that of the dense head, each token by itself too",
    kind=KINDS,
    dtype=(torch.float64, torch.bfloat16),
)
def likeliest_tokens(me, kind, dtype):
    p = Problem(dtype, seed=2)
    pair, *known = likeliest(p)
    shard, wide = p.shard(me, "padded" if kind in ("forward_kl", "jsd") else "uneven"), p.leaves()
    each = truth_of(p, wide, kind, *known)
    leaf, options = p.arguments(shard)
    options |= {"teacher_topk": pair, "kind": kind, **KINDS[kind]}
    call = rlk.linear_distillation_loss
    loss, metrics = call(leaf, shard.weight, mask=p.mask, chunk_tokens=4, return_metrics=True, **options)
    true = each.sum() / p.mask.sum()
    exact = p.real == torch.float64
    torch.testing.assert_close(loss.double(), true, rtol=1e-11 if exact else 2e-5, atol=1e-12)
    torch.testing.assert_close(metrics["divergence"], loss, rtol=1e-5, atol=1e-7)
    whole = p.leaves(dtype)
    dense = call(*whole[:2], mask=p.mask, teacher_topk=pair, kind=kind, bias=whole[2], **KINDS[kind], **p.settings)
    torch.testing.assert_close(loss, dense, rtol=1e-12 if exact else 1e-5, atol=0)
    operands = leaf, shard.weight, shard.bias
    got = torch.autograd.grad(3 * loss, operands)
    assert_gradients(got, torch.autograd.grad(3 * true, wide, retain_graph=True), shard, kind, factor=10, flat=True)
    apart = call(leaf, shard.weight, mask=p.mask, chunk_tokens=16, reduction="none", **options)
    close = {"rtol": 1e-11, "atol": 1e-12} if exact else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(apart.double(), each.detach(), **close)
    more = torch.autograd.grad(apart, operands, p.cotangents[1])
    expected = torch.autograd.grad(each, wide, p.cotangents[1].double())
    assert_gradients(more, expected, shard, f"{kind} of tokens", factor=10, flat=True)
    return {"loss": loss, "each": apart, "hidden": got[0]}


@case("a shard without a column of the vocabulary holds none of a teacher's likeliest tokens")
def no_column_of_likeliest_tokens(me):
    p = Problem(torch.float64, vocab=5)
    p.settings = {}
    pair, *known = likeliest(p, 3)
    shard, wide = p.shard(me, 8), p.leaves()
    leaf, options = p.arguments(shard)
    found = rlk.linear_distillation_loss(
        leaf, shard.weight, mask=p.mask, teacher_topk=pair, aggregation="token-sum", **options
    )
    true = truth_of(p, wide, "forward_kl", *known).sum()
    torch.testing.assert_close(found, true, rtol=1e-11, atol=0)
    got = torch.autograd.grad(found, (leaf, shard.weight, shard.bias))
    assert_gradients(got, torch.autograd.grad(true, wide), shard, "forward_kl", factor=4)
    return {"loss": found}


@case("a teacher's likeliest tokens take two collectives per chunk, of 4 and of K numbers per token")
def traffic_of_likeliest_tokens(me):
    p = Problem(shape=(2, 8))
    p.mask[:] = True
    pair, *_ = likeliest(p)
    shard = p.shard(me, "padded")
    leaf, options = p.arguments(shard)
    with counted() as calls:
        loss = rlk.linear_distillation_loss(leaf, shard.weight, teacher_topk=pair, chunk_tokens=8, **options)
        loss.backward()
    sizes, whole = [call[1:] for call in calls], p.hidden.numel()
    chunks = [(n * 8, torch.float32) for n in (4, K)] * 2
    assert sizes == [AGREEMENT, *chunks, (whole, torch.float32)], sizes


@case("a compiled distillation from a teacher's likeliest tokens is the plain one")
def compiled_likeliest_tokens(me):
    if me.ranks > 2:  # the graph is that of two ranks, and to trace it takes a second
        return
    p = Problem(torch.float64)
    pair, *_ = likeliest(p)
    shard = p.shard(me, "uneven")
    leaf, options = p.arguments(shard)

    def call(hidden):
        return rlk.linear_distillation_loss(hidden, shard.weight, mask=p.mask, teacher_topk=pair, **options)

    plain, compiled = call(leaf), torch.compile(call, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(plain, compiled)
    for one, other in zip(*(torch.autograd.grad(x, (leaf, shard.weight)) for x in (plain, compiled)), strict=True):
        assert torch.equal(one, other)


def refusal(p, shard, kind, pair, **more):
    leaf, options = p.arguments(shard)
    call = rlk.linear_distillation_loss
    return error_of(call, leaf, shard.weight, mask=p.mask, teacher_topk=pair, kind=kind, **more, **options)


@case("likeliest tokens that are wrong are refused on every rank, on whichever rank they are")
def bad_likeliest_tokens(me):
    p = Problem()
    (ids, logprobs), *_ = likeliest(p)
    shard, last = p.shard(me, "uneven"), me.rank == me.ranks - 1
    outside, twice, above = ids.clone(), ids.clone(), logprobs.clone()
    outside[0, 1, 2], twice[0, 1, 2], above[0, 1, 2] = p.vocab, twice[0, 1, 3], 0.5
    text = f"id {p.vocab} of teacher_topk at row 1 is outside [0, {p.vocab})"
    found = [refusal(p, shard, IndexError, (outside, logprobs))]
    assert text in found[0], found
    found.append(refusal(p, shard, ValueError, (twice, logprobs)))
    assert "ids of teacher_topk hold one id twice at row 1" in found[-1], found
    found.append(refusal(p, shard, ValueError, (ids, above)))
    assert "logprobs of teacher_topk hold 0.5" in found[-1], found
    found.append(refusal(p, shard, ValueError, (ids, logprobs), vocab_mask=torch.ones(p.vocab, dtype=torch.bool)))
    assert "vocab_mask goes with teacher_hidden" in found[-1], found
    alone = refusal(p, shard, IndexError if last else RuntimeError, (outside if last else ids, logprobs))
    assert text in alone and (last or f"rank {me.ranks - 1} of process_group raised IndexError" in alone), alone
    served(me)
    return alike("".join(found))


@case("likeliest tokens that differ on one rank are refused on every rank")
def unlike_likeliest_tokens(me):
    p = Problem()
    (ids, logprobs), *_, used = likeliest(p)
    shard, last = p.shard(me, "padded"), me.rank == me.ranks - 1
    # The id of an entry that is not used may be anything.
    anything = torch.where(used | ~p.mask[..., None], ids, me.rank)
    leaf, options = p.arguments(shard)
    rlk.linear_distillation_loss(leaf, shard.weight, mask=p.mask, teacher_topk=(anything, logprobs), **options)
    swapped, flatter, fewer = ids.clone(), logprobs, K - 1 if last else K
    if last:
        swapped[0, 1, [0, 1]], flatter = ids[0, 1, [1, 0]], logprobs / 2
    found = []
    for pair, text in (
        ((swapped, logprobs), "digest of the teacher's ids"),
        ((ids, flatter), "sum of probabilities of the teacher"),
        ((ids[..., :fewer], logprobs[..., :fewer]), f"teacher_topk .*, {K}].*teacher_topk .*, {K - 1}]"),
    ):
        found.append(refusal(p, shard, RuntimeError, pair))
        assert re.search(f"the ranks of process_group differ. .*{text}", found[-1]), found[-1]
    served(me)
    return alike("".join(found))
