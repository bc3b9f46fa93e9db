"""What a head over a process group promises, one function per promise, run by every rank of 2 and of 4 processes."""

import itertools

import torch
import torch.distributed as dist
from reference import same_bits
from vocab_parallel_worker import (
    OUTPUTS,
    WIDTH,
    L,
    Me,
    Problem,
    assert_gradients,
    assert_near,
    assert_statistics,
    counted,
    true_policy_loss,
)

import rlkernels as rlk

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
AGREEMENT = 80, torch.int64  # what a rank says of its call, whatever the call
CASES = {}


def case(sentence, **grid):
    """Registers a function under a sentence, once per point of the grid."""

    def add(function):
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            CASES[sentence.format(**chosen)] = lambda me, chosen=chosen: function(me, **chosen)
        return function

    return add


def stats_of(problem, shard, hidden=None, **more):
    leaf, options = problem.arguments(shard, hidden)
    return rlk.linear_token_stats(leaf, shard.weight, problem.targets, outputs=OUTPUTS, **{**options, **more}), leaf


def policy_of(problem, shard, level="token", hidden=None, **more):
    leaf, options = problem.arguments(shard, hidden)
    options = {
        **options,
        "ref_logprobs": problem.ref,
        "kl_coef": 0.1,
        "entropy_coef": 0.02,
        "ratio_level": level,
        **more,
    }
    return rlk.linear_policy_loss(
        leaf, shard.weight, problem.targets, problem.old, problem.advantages, problem.mask, **options
    ), leaf


def check_statistics(me, p, layout, **more):
    """Every output, and the gradients of log-probability and entropy, against the dense head in float64."""
    shard, wide, (g, e) = p.shard(me, layout), p.leaves(), p.cotangents
    truth = p.truth(wide)
    stats, leaf = stats_of(p, shard, **more)
    assert_statistics(stats, p, truth)
    got = torch.autograd.grad((stats.logprobs * g + stats.entropy * e).sum(), (leaf, shard.weight, shard.bias))
    expected = torch.autograd.grad((truth["logprobs"] * g + truth["entropy"] * e).sum(), wide, retain_graph=True)
    assert_gradients(got, expected, shard, "logprobs and entropy")
    leaf, options = p.arguments(shard)
    logp = rlk.linear_token_logprobs(leaf, shard.weight, p.targets, **{**options, **more})
    assert same_bits(logp, stats.logprobs)
    alone = torch.autograd.grad(logp, (leaf, shard.weight, shard.bias), g)
    assert_gradients(alone, torch.autograd.grad(truth["logprobs"], wide, g.double()), shard, "logprobs")
    return {
        **{name: x for name, x in stats._asdict().items() if x is not None},
        "hidden": got[0],
        "hidden of logprobs": alone[0],
    }


@case(
    "statistics and gradients in {dtype} over {layout} shards are those of the dense head",
    dtype=DTYPES,
    layout=("padded", "uneven"),
)
def statistics_are_dense(me, dtype, layout):
    return check_statistics(me, Problem(DTYPES[dtype]), layout, chunk_tokens=5)


@case("a vocabulary that the ranks divide needs no option")
def even(me):
    return check_statistics(me, Problem(vocab=132), 132 // me.ranks)


@case(
    "a head without bias, softcap, scale and temperature is the dense one on the {backend} backend",
    backend=("eager", "automatic"),
)
def plain(me, backend):
    p = Problem(seed=3)
    p.settings, p.bias = {}, torch.zeros_like(p.bias)
    if backend == "automatic":
        return check_statistics(me, p, "padded")
    with rlk.use_backend("eager"):
        return check_statistics(me, p, "padded")


@case(
    "a policy loss in {dtype} with ratios per {level} is the dense one, {chunk} rows at a time",
    dtype=DTYPES,
    level=("token", "sequence", "sequence_token"),
    chunk=(4, 16),
)
def policy_is_dense(me, dtype, level, chunk):
    p = Problem(DTYPES[dtype], seed=1)
    shard, wide = p.shard(me, "padded" if chunk == 4 else "uneven"), p.leaves()
    # A sequence has 7 tokens: of 4 rows it needs two chunks.
    loss, leaf = policy_of(p, shard, level, chunk_tokens=chunk)
    truth, size = true_policy_loss(p, p.truth(wide), level)
    assert (loss.double() - truth).abs() <= (1e-12 if p.real == torch.float64 else 2e-6) * size
    operands = leaf, shard.weight, shard.bias
    got = torch.autograd.grad(3 * loss, operands, retain_graph=True)
    assert_gradients(got, torch.autograd.grad(3 * truth, wide), shard, level, factor=2)
    for again, first in zip(torch.autograd.grad(3 * loss, operands), got, strict=True):
        assert same_bits(again, first)  # a second backward makes them anew
    return {"loss": loss, "hidden": got[0]}


@case("packed sequences with a ratio each are those of the padded batch")
def packed(me):
    p = Problem(torch.float64)
    shard = p.shard(me, "uneven")
    loss, leaf = policy_of(p, shard, "sequence")
    hidden, options = p.arguments(shard)
    flat = {name: x.reshape(-1) for name, x in {"ref_logprobs": p.ref, "temperature": p.temperature}.items()}
    rows = [x.reshape(-1) for x in (p.targets, p.old, p.advantages, p.mask)]
    again = rlk.linear_policy_loss(
        hidden.reshape(-1, WIDTH),
        shard.weight,
        *rows,
        cu_seqlens=torch.arange(0, 22, L),
        kl_coef=0.1,
        entropy_coef=0.02,
        ratio_level="sequence",
        **{**options, **flat},
    )
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(again, hidden), torch.autograd.grad(loss, leaf), rtol=1e-11, atol=1e-15
    )


@case("a shard without a column of the vocabulary takes no part")
def no_column(me):
    p = Problem(vocab=5)
    p.targets[0, :5] = torch.arange(5)
    # Rank 0 has all five columns and three rows of padding, the others have padding alone.
    return check_statistics(me, p, 8)


@case("targets on the first and last column of every shard find them, {layout}", layout=("padded", "uneven"))
def edges(me, layout):
    everyone = [Problem(vocab=133).shard(Me(rank, me.ranks, me.group), layout).mine for rank in range(me.ranks)]
    p = Problem(torch.float64, shape=(1, 2 * me.ranks))
    p.targets = torch.tensor([[column for mine in everyone for column in (mine.start, mine.stop - 1)]])
    return check_statistics(me, p, layout)


@case("logits of -inf on the whole of shard {dead} count as absent columns", dead=(0, 1))
def dead_shard(me, dead):
    p = Problem(torch.float64)
    here = p.shard(Me(dead, me.ranks, me.group), "uneven").mine
    p.settings = {"temperature": p.temperature}
    p.bias[here] = -torch.inf
    p.targets[0, 0] = here.start  # its log-probability is -inf
    shard, wide = p.shard(me, "uneven"), p.leaves()
    stats, leaf = stats_of(p, shard)
    truth = p.truth(wide)
    assert stats.logprobs[0, 0] == -torch.inf and stats.entropy.isfinite().all()
    assert_statistics(stats, p, truth)
    g = p.cotangents[0]
    finite = torch.where(truth["logprobs"].isfinite(), g, 0.0)
    for upstream in (g, finite):
        got = torch.autograd.grad(stats.logprobs, (leaf, shard.weight), upstream, retain_graph=True)
        assert_gradients(
            (*got, None),
            torch.autograd.grad(truth["logprobs"], wide, upstream, retain_graph=True),
            shard,
            "logprobs",
            factor=10,
        )
    return {"logprobs": stats.logprobs, "entropy": stats.entropy, "hidden": got[0]}


@case("logits of -inf on every shard make the row NaN, as they do in one piece")
def dead_row(me):
    p = Problem()
    p.settings, p.bias = {}, torch.full_like(p.bias, -torch.inf)
    stats, leaf = stats_of(p, p.shard(me, "padded"))
    live = p.targets != -100
    assert (
        all(x[live].isnan().all() for x in (stats.logprobs, stats.logsumexp, stats.entropy, stats.log_sum_sq_probs))
        and not stats.is_top1.any()
    )
    (got,) = torch.autograd.grad(stats.logprobs.sum(), leaf)
    assert got[live].isnan().all() and (got[~live] == 0).all()
    assert (stats.logprobs[~live] == 0).all() and (stats.entropy[~live] == 0).all()


@case("a {what} on rank {where} alone poisons its row and no other, on every rank", what=("NaN", "inf"), where=(0, 1))
def poison(me, what, where):
    p, clean = Problem(), Problem()
    for q in (p, clean):
        q.settings = {}
        q.hidden[..., :2] = 0.0  # two features that one row alone has
        q.weight[:, :2] = 0.0
        q.mask[:] = True
    row = (0, 3)
    p.hidden[0, 3, :2] = 1e30
    column = p.shard(Me(where, me.ranks, me.group), "padded").mine.start
    p.weight[column, :2] = torch.tensor([1e30, -1e30 if what == "NaN" else 0.0])
    shard = p.shard(me, "padded")
    stats, leaf = stats_of(p, shard)
    expected, clean_leaf = stats_of(clean, clean.shard(me, "padded"))
    others = torch.ones(p.shape, dtype=torch.bool)
    others[row] = False
    for name in ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs"):
        got = getattr(stats, name)
        assert got[row].isnan() or (name, what) == ("logsumexp", "inf"), f"{name}: {got[row]}"
        assert same_bits(got[others], getattr(expected, name)[others]), name
    (got,), (kept,) = (
        torch.autograd.grad(s.logprobs, x, p.cotangents[0]) for s, x in ((stats, leaf), (expected, clean_leaf))
    )
    assert got[row].isnan().all() and torch.equal(got[others][:, 2:], kept[others][:, 2:])
    loss, leaf = policy_of(p, shard)
    (got,) = torch.autograd.grad(loss, leaf)
    assert loss.isnan() and got[row].isnan().all() and got[others].isfinite().all()
    return {"logprobs": stats.logprobs[others], "hidden": got[others]}


@case("of equal maxima on several shards the first is the top one")
def ties(me):
    p = Problem(vocab=4 * me.ranks, shape=(1, 4 * me.ranks))
    p.settings, p.bias, p.hidden = {}, torch.zeros_like(p.bias), torch.ones_like(p.hidden)
    p.weight = torch.zeros_like(p.weight)
    # The last column of the first shard, one of the second, the last of all.
    p.weight[[3, 5, 4 * me.ranks - 1], 0] = 2.0
    p.targets = torch.arange(4 * me.ranks)[None]
    stats, _ = stats_of(p, p.shard(me, 4))
    assert stats.is_top1[0].nonzero().flatten().tolist() == [3]
    p.targets[0, 3] = -100
    assert not stats_of(p, p.shard(me, 4))[0].is_top1.any()


@case("a row in {dtype} has the same bits alone, in the batch and in any chunk", dtype=DTYPES)
def bits(me, dtype):
    p = Problem(DTYPES[dtype])
    shard = p.shard(me, "uneven")
    whole, _ = stats_of(p, shard)
    for chunk in (1, 5, 16):
        for name, x in stats_of(p, shard, chunk_tokens=chunk)[0]._asdict().items():
            assert x is None or same_bits(x, getattr(whole, name)), (name, chunk)
    for row in ((0, 0), (1, 4), (2, 6)):
        options = {**p.settings, "temperature": p.temperature[row][None], "bias": shard.bias, **shard.options}
        stats = rlk.linear_token_stats(
            p.hidden[row][None], shard.weight, p.targets[row][None], outputs=OUTPUTS, **options
        )
        for name, x in stats._asdict().items():
            assert x is None or same_bits(x, getattr(whole, name)[row][None]), (name, row)
    return {"logprobs": whole.logprobs}


@case(
    "what is frozen gets no gradient: hidden {hidden}, weight {weight}, bias {bias}",
    hidden=(0, 1),
    weight=(0, 1),
    bias=(0, 1),
)
def frozen(me, hidden, weight, bias):
    p = Problem()
    shard, wide = p.shard(me, "padded"), p.leaves()
    leaf, options = p.arguments(shard)
    operands = leaf, shard.weight, shard.bias
    for x, on in zip(operands, (hidden, weight, bias), strict=True):
        x.requires_grad_(bool(on))
    truth = torch.autograd.grad(p.truth(wide)["logprobs"], wide, p.cotangents[0].double())
    with counted() as calls:
        logp = rlk.linear_token_logprobs(leaf, shard.weight, p.targets, **options)
        assert logp.requires_grad == bool(hidden or weight or bias)
        if not logp.requires_grad:
            return
        logp.backward(p.cotangents[0])
    assert ("all_reduce" in [name for name, *_ in calls]) == bool(hidden)
    count = shard.mine.stop - shard.mine.start
    for x, expected, on, end in zip(operands, truth, (hidden, weight, bias), (None, count, count), strict=True):
        assert (x.grad is not None) == bool(on)
        if on and end is None:
            assert_near(x.grad, expected, "hidden")
        elif on:
            assert_near(x.grad[:end], expected[shard.mine], "shard", size=expected.norm())


@case(
    "a forward sends at most {numbers} numbers per token and rank in one collective per chunk, a backward the "
    "hidden gradient alone",
    numbers=(4, 8),
)
def traffic(me, numbers):
    p = Problem()
    shard = p.shard(me, "padded")
    outputs = OUTPUTS if numbers == 8 else ()
    live = int((p.targets != -100).sum())
    leaf, options = p.arguments(shard)
    with counted() as calls:
        stats = rlk.linear_token_stats(leaf, shard.weight, p.targets, outputs=outputs, chunk_tokens=8, **options)
        cover, *chunks = calls.copy()
        calls.clear()
        stats.logprobs.sum().backward()
    assert cover[1:] == AGREEMENT  # what the ranks must have in common: read on the host, and on the CPU alone
    assert [size for _, size, _ in chunks] == [numbers * rows for rows in (8, 8, live - 16)] and {
        dtype for *_, dtype in chunks
    } == {torch.float32}
    assert calls.pop(0)[1:] == AGREEMENT
    assert calls == [("all_reduce", p.hidden.numel(), torch.float32)]


@case(
    "a policy loss sends {numbers} numbers per live token and the hidden gradient, and nothing in its backward",
    numbers=(4, 5),
)
def traffic_of_a_loss(me, numbers):
    p = Problem()
    live = int((p.mask & (p.targets != -100)).sum())
    with counted() as calls:
        loss, _ = policy_of(p, p.shard(me, "padded"), entropy_coef=0.02 * (numbers == 5), chunk_tokens=16)
        chunks = [size for name, size, _ in calls if "gather" in name]
        assert chunks == [AGREEMENT[0], *(numbers * min(16, live - start) for start in range(0, live, 16))]
        assert [call for call in calls if "gather" not in call[0]] == [("all_reduce", p.hidden.numel(), torch.float32)]
        calls.clear()
        loss.backward()
        assert not calls
        p.mask[:] = False
        policy_of(p, p.shard(me, "padded"))
        assert [size for _, size, _ in calls] == [AGREEMENT[0], p.hidden.numel()]  # no token lives


@case(
    "groups inside the world: the vocabulary over {inside} ranks, tokens over the others, one global number of tokens",
    inside=(1, 2),
)
def mesh(me, inside):
    groups = [dist.new_group(list(range(start, start + inside))) for start in range(0, me.ranks, inside)]
    number, parts = me.rank // inside, me.ranks // inside
    p = Problem(torch.float64, shape=(4, L))
    wide = p.leaves()
    truth, _ = true_policy_loss(p, p.truth(wide))
    expected = torch.autograd.grad(truth, wide)
    rows = slice(number * 4 // parts, (number + 1) * 4 // parts)
    shard = p.shard(Me(me.rank % inside, inside, groups[number]), "uneven")
    count = (p.mask & (p.targets != -100)).sum()
    for name in ("hidden", "targets", "old", "ref", "advantages", "mask", "temperature"):
        setattr(p, name, getattr(p, name)[rows])
    p.settings["temperature"] = p.temperature
    loss, leaf = policy_of(p, shard, normalizers={"batch_num_tokens": count})
    loss.backward()
    assert_near(leaf.grad, expected[0][rows], "hidden")
    total = loss.detach().clone()
    # Who hold the same columns.
    peers = [dist.new_group(list(range(column, me.ranks, inside))) for column in range(inside)]
    for x in (total, shard.weight.grad, shard.bias.grad):
        dist.all_reduce(x, group=peers[me.rank % inside])
    torch.testing.assert_close(total, truth.detach(), rtol=1e-12, atol=0)
    count = shard.mine.stop - shard.mine.start
    assert_near(shard.weight.grad[:count], expected[1][shard.mine], "weight", size=expected[1].norm())
    assert_near(shard.bias.grad[:count], expected[2][shard.mine], "bias", size=expected[2].norm())
    return {"loss": total}
