"""More cases of a head over a process group: what it refuses, how it composes with other machinery, and tokens spread
over processes.
"""

import re

import oracles
import torch
import torch.distributed as dist
from reference import same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from vocab_parallel_cases import case, policy_of, stats_of
from vocab_parallel_worker import WIDTH, L, Problem, assert_gradients, assert_near, counted, true_policy_loss

import rlkernels as rlk


def refused(message, hidden, weight, targets, **options):
    try:
        rlk.linear_token_logprobs(hidden, weight, targets, **options)
    except ValueError as error:
        assert re.search(f"^linear_token_logprobs: .*{message}", str(error)), str(error)
    else:
        raise AssertionError(f"no error; expected {message!r}")


@case("B52 shards that do not lie end to end are refused on every rank, and the next call is served")
def bad_cover(me):
    h, y, group, last = torch.zeros(4, WIDTH), torch.zeros(4, dtype=torch.long), me.group, me.rank == me.ranks - 1

    def head(rows, **options):
        return h, torch.zeros(rows, WIDTH), y, {"process_group": group, **options}

    cases = {
        "a vocabulary shard starts at .*expected .*pass vocab_start": head(10 + me.rank),
        "a vocabulary shard starts at 11, expected 10": head(10, vocab_start=11 * me.rank, valid_vocab=100),  # a gap
        "a vocabulary shard starts at 9, expected 10": head(
            10, vocab_start=9 * me.rank, valid_vocab=10 * me.ranks
        ),  # an overlap
        "the vocabulary shards hold .* of 1000 columns": head(10, valid_vocab=1000),
        "the vocabulary shards are of vocabularies of different sizes.* pass the same valid_vocab": head(
            10, valid_vocab=10 * me.ranks - last
        ),
    }
    for message, (*arguments, options) in cases.items():
        refused(message, *arguments, **options)
    refused(
        "with vocab_start the shards may differ in size; pass the whole vocabulary as valid_vocab",
        *head(10)[:3],
        process_group=group,
        vocab_start=0,
    )
    *arguments, options = head(10)
    rlk.linear_token_logprobs(*arguments, **options)


@case("a process outside the group is told so")
def outside(me):
    inner = dist.new_group([0])
    arguments = torch.zeros(4, WIDTH), torch.zeros(10, WIDTH), torch.zeros(4, dtype=torch.long)
    if me.rank:
        refused("this process is not in process_group, so it has no vocabulary shard", *arguments, process_group=inner)
    else:
        rlk.linear_token_logprobs(*arguments, process_group=inner)


@case("B22 a shard with zero elements is refused on every rank, and names how to gather it")
def empty_shard(me):
    for empty in (torch.empty(0), torch.empty(0, WIDTH)):
        refused(
            r"weight has 0 elements; gather it first "
            r"\(ZeRO-3",
            torch.zeros(4, WIDTH),
            empty,
            torch.zeros(4, dtype=torch.long),
            process_group=me.group,
        )


@case(
    "B23 a DTensor weight is refused on every rank, and names how to gather it; gathered, it gets its gradient "
    "as a DTensor"
)
def dtensor(me):
    p = Problem(torch.float64, seed=8)
    mesh = init_device_mesh("cpu", (me.ranks,))
    weight = distribute_tensor(p.weight, mesh, [Shard(0)]).requires_grad_()
    leaf, bias = p.hidden.clone().requires_grad_(), p.bias.clone()
    try:
        rlk.linear_token_logprobs(leaf, weight, p.targets, bias=bias)
    except TypeError as error:
        assert "weight is a DTensor; pass weight.full_tensor(), or its local rows with process_group" in str(error), (
            str(error)
        )
    else:
        raise AssertionError("a DTensor went through")
    rlk.linear_token_logprobs(leaf, weight.full_tensor(), p.targets, bias=bias, **p.settings).backward(p.cotangents[0])
    wide = p.leaves()
    expected = torch.autograd.grad(p.truth(wide)["logprobs"], wide, p.cotangents[0])
    assert isinstance(weight.grad, DTensor)
    assert_near(weight.grad.full_tensor(), expected[1], "weight")  # every rank has the same tokens: copies, not parts
    assert_near(leaf.grad, expected[0], "hidden")
    rows = weight.to_local()  # uneven where the ranks do not divide the vocabulary
    start = me.rank * -(-p.vocab // me.ranks)
    again = rlk.linear_token_logprobs(
        leaf,
        rows,
        p.targets,
        bias=bias[start : start + len(rows)],
        **p.settings,
        process_group=me.group,
        vocab_start=start,
        valid_vocab=p.vocab,
    )
    torch.testing.assert_close(again, p.truth()["logprobs"], rtol=1e-12, atol=1e-12)


@case("a target outside the whole vocabulary is refused on every rank, one in another shard is not")
def bad_target(me):
    p = Problem()
    shard = p.shard(me, "padded")
    for target in (p.vocab, -1):
        p.targets[1, 3] = target
        try:
            stats_of(p, shard)
        except IndexError as error:
            assert f"target {target} at row 10 is outside [0, {p.vocab})" in str(error), str(error)
        else:
            raise AssertionError(f"target {target} went through")


@case("logits at the lowest finite number are columns, on one shard or on all")
def lowest(me):
    for dead in (slice(0, 40), slice(0, None)):
        p = Problem(torch.float32)
        p.settings, p.weight = {}, torch.zeros_like(p.weight)
        p.bias[dead] = torch.finfo(torch.float32).min
        stats, _ = stats_of(p, p.shard(me, "uneven"))
        truth = p.truth()
        torch.testing.assert_close(stats.logprobs.double(), truth["logprobs"], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(stats.entropy.double(), truth["entropy"], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(stats.log_sum_sq_probs.double(), truth["log_sum_sq_probs"], rtol=1e-6, atol=1e-5)


@case("ranks with unlike shares of the vocabulary agree on the rows of a chunk, whatever the budget")
def one_chunk_size(me):
    p = Problem()
    shard = p.shard(me, "uneven")
    whole, _ = stats_of(p, shard)
    with counted() as calls:
        found, _ = stats_of(p, shard, logits_budget=16384)
    assert same_bits(found.logprobs, whole.logprobs) and same_bits(found.entropy, whole.entropy)
    return {"sizes": torch.tensor([size for _, size, _ in calls])}


@case("a bound on the live tokens changes no bit, and one too small is refused on every rank")
def bound(me):
    p = Problem()
    shard, live = p.shard(me, "uneven"), int((p.targets != -100).sum())
    (free, leaf), (bounded, other) = stats_of(p, shard), stats_of(p, shard, max_live_tokens=live + 3, chunk_tokens=16)
    assert same_bits(free.logprobs, bounded.logprobs) and same_bits(free.entropy, bounded.entropy)
    grads = (torch.autograd.grad(s.logprobs, x, p.cotangents[0])[0] for s, x in ((free, leaf), (bounded, other)))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    weighted = int((p.mask & (p.targets != -100)).sum())
    (free, leaf), (bounded, other) = policy_of(p, shard), policy_of(p, shard, max_live_tokens=weighted + 3)
    torch.testing.assert_close(free, bounded, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, x)[0] for loss, x in ((free, leaf), (bounded, other))), rtol=1e-5, atol=1e-7
    )
    for function, count in ((stats_of, live), (policy_of, weighted)):
        try:
            function(p, shard, max_live_tokens=count - 1)
        except ValueError as error:
            assert f"max_live_tokens={count - 1}, but {count} tokens are live" in str(error)
        else:
            raise AssertionError("a bound too small went through")


@case(
    "activation checkpointing recomputes the same bits, collectives included, reentrant {reentrant}",
    reentrant=(False, True),
)
def checkpointed(me, reentrant):
    p = Problem()
    shard = p.shard(me, "padded")

    def loss(hidden):
        stats, _ = stats_of(p, shard, hidden=hidden)
        return (stats.logprobs * p.cotangents[0]).sum() + policy_of(p, shard, hidden=hidden)[0]

    gradients = []
    for run in (loss, lambda hidden: checkpoint(loss, hidden, use_reentrant=reentrant)):
        leaf = p.hidden.clone().requires_grad_()
        shard.weight.grad = None
        run(leaf).backward()
        gradients += [(leaf.grad, shard.weight.grad)]
    for plain, again in zip(*gradients, strict=True):
        assert same_bits(plain, again)
    return {"hidden": gradients[0][0]}


@case("torch.compile takes a sharded {what} as one graph", what=("log-probability", "policy loss"))
def compiled(me, what):
    p = Problem()
    shard = p.shard(me, "padded")

    def function(hidden):
        if what == "policy loss":
            return policy_of(p, shard, hidden=hidden)[0]
        return rlk.linear_token_logprobs(
            hidden, shard.weight, p.targets, bias=shard.bias, **p.settings, **shard.options
        )

    leaf = p.hidden.clone().requires_grad_()
    found, plain = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf), function(leaf)
    torch.testing.assert_close(found, plain, rtol=2e-6, atol=1e-7)
    gradients = (torch.autograd.grad(x.sum(), (leaf, shard.weight)) for x in (found, plain))
    for compiled_one, plain_one in zip(*gradients, strict=True):
        assert_near(compiled_one, plain_one.double(), what, factor=2)


@case("scoring without gradients gives the log-probabilities of the dense head")
def scored(me):
    p = Problem()
    shard, truth = p.shard(me, "uneven"), p.truth()
    with torch.no_grad():
        logp = rlk.linear_token_logprobs(
            p.hidden, shard.weight, p.targets, bias=shard.bias, **p.settings, **shard.options
        )
    assert not logp.requires_grad
    torch.testing.assert_close(logp.double(), truth["logprobs"], rtol=1e-5, atol=2e-6)
    return {"logp": logp}


@case(
    "tokens over processes: shifted before the cut, one global number of tokens, the sum over ranks is the whole "
    "({dtype})",
    dtype=(torch.float32, torch.float64),
)
def context_parallel(me, dtype):
    """No process_group: every rank has the whole head and its part of every sequence. 12 tokens, the labels of a part
    cross its end.
    """
    p = Problem(dtype, seed=5, shape=(2, 12))
    ids = torch.cat([torch.zeros(2, 1, dtype=torch.long), p.targets.clamp(min=0)], 1)
    p.targets = ids[:, 1:]  # shifted once, before anything is cut
    wide = p.leaves()
    truth, size = true_policy_loss(p, p.truth(wide))
    expected = torch.autograd.grad(truth, wide)
    count = p.mask.sum()
    mine = slice(me.rank * 12 // me.ranks, (me.rank + 1) * 12 // me.ranks)
    hidden, weight, bias = p.leaves(dtype)
    local = hidden.detach()[:, mine].requires_grad_()

    def loss_of(targets):
        return rlk.linear_policy_loss(
            local,
            weight,
            targets,
            p.old[:, mine],
            p.advantages[:, mine],
            p.mask[:, mine],
            bias=bias,
            softcap=5.0,
            logit_scale=1.5,
            temperature=p.temperature[:, mine],
            ref_logprobs=p.ref[:, mine],
            kl_coef=0.1,
            entropy_coef=0.02,
            normalizers={"batch_num_tokens": count},
        )

    def total_of(loss):
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.double()

    loss = loss_of(p.targets[:, mine])
    loss.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert (total_of(loss) - truth).abs() <= tolerance * size
    inside = (
        ids[:, mine.start : mine.stop + 1][:, 1:]
        if me.rank == me.ranks - 1
        else torch.cat([ids[:, mine][:, 1:], torch.full((2, 1), -100)], 1)
    )
    # Shifted inside the part: a label is lost at every cut.
    assert (total_of(loss_of(inside)) - truth).abs() > 100 * tolerance * size
    assert_near(local.grad, expected[0][:, mine], "hidden", factor=2)
    for name, x, t in (("weight", weight, expected[1]), ("bias", bias, expected[2])):
        dist.all_reduce(x.grad)
        assert_near(x.grad, t, name, factor=2)


@case(
    "sequences over processes: ratios of whole sequences need whole sequences on a rank, their mean over all ranks "
    "one global number"
)
def sequence_parallel(me):
    p = Problem(torch.float64, seed=6, shape=(4, L))
    wide = p.leaves()
    truth, _ = true_policy_loss(p, p.truth(wide), "sequence", kl_coef=0.0, entropy_coef=0.0)
    mine = slice(me.rank * 4 // me.ranks, (me.rank + 1) * 4 // me.ranks)
    loss = rlk.linear_policy_loss(
        p.hidden[mine],
        p.weight,
        p.targets[mine],
        p.old[mine],
        p.advantages[mine],
        p.mask[mine],
        bias=p.bias,
        softcap=5.0,
        logit_scale=1.5,
        temperature=p.temperature[mine],
        ratio_level="sequence",
        normalizers={"batch_num_tokens": (p.mask & (p.targets != -100)).sum()},
    )
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, truth.detach(), rtol=1e-12, atol=0)


@case(
    "supervised and preference losses of a sharded head in {dtype} are the dense ones",
    dtype=(torch.float32, torch.float64, torch.bfloat16),
)
def other_losses(me, dtype):
    p = Problem(dtype, seed=7, shape=(4, L))
    live = p.mask & (p.targets != -100)
    references = [x.sum(-1) for x in (p.ref[:2] * live[:2], p.ref[2:] * live[2:])]

    def margin_loss(logp):
        sums = torch.where(live, logp, 0.0).sum(-1)
        margin = (sums[:2] - references[0].double()) - (sums[2:] - references[1].double())
        return oracles.dpo_sigmoid(margin, 0.3, 0.0).mean()

    found = {}
    for name, call, true in (
        (
            "sft",
            lambda h, w, **o: rlk.linear_sft_loss(h, w, p.targets, p.mask, **o),
            lambda truth: -torch.where(live, truth["logprobs"], 0.0).sum() / live.sum(),
        ),
        (
            "z-loss",
            lambda h, w, **o: rlk.linear_sft_loss(h, w, p.targets, p.mask, z_loss_coef=0.1, **o),
            lambda truth: torch.where(live, 0.1 * truth["logsumexp"] ** 2 - truth["logprobs"], 0.0).sum() / live.sum(),
        ),
        (
            "dpo",
            lambda h, w, **o: rlk.linear_dpo_loss(
                h, w, p.targets, p.mask, ref_chosen_logps=references[0], ref_rejected_logps=references[1], beta=0.3, **o
            ),
            lambda truth: margin_loss(truth["logprobs"]),
        ),
    ):
        for chunk in (4, 64):  # an answer has up to 7 live tokens
            shard, wide = p.shard(me, "padded" if chunk == 4 else "uneven"), p.leaves()
            leaf, options = p.arguments(shard)
            loss, truth = call(leaf, shard.weight, chunk_tokens=chunk, **options), true(p.truth(wide))
            torch.testing.assert_close(loss.double(), truth, rtol=1e-12 if p.real == torch.float64 else 1e-5, atol=0)
            got = torch.autograd.grad(3 * loss, (leaf, shard.weight, shard.bias))
            assert_gradients(got, torch.autograd.grad(3 * truth, wide), shard, name, factor=5)
            found |= {f"{name} {chunk}": loss, f"hidden of {name} {chunk}": got[0]}
    return found
