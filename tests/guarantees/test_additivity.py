"""Every term is additive: the losses of micro-batches and ranks, made with the normalisers of the whole batch, add up
to the loss of the batch.

A batch is cut between its sequences in any way, in any order, padded or packed; a part may be empty, and its padding is
its own.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_batches import LEVELS, OF_ROLLOUT, PARAMS

import rlkernels as rlk
from rlkernels.aggregation import AGGREGATIONS
from rlkernels.objectives import OBJECTIVES

V, H = 7, 5
POLICIES = [
    name
    for name, entry in OBJECTIVES.items()
    if "advantage" in entry.columns and entry.function.__module__.startswith("rlkernels.")
]
SETTINGS = {**PARAMS, **OF_ROLLOUT}
WITH_WEIGHTS = (*AGGREGATIONS, "weights")
# Half a minute on one core in all; what is wrong in a mode is wrong in every cut of it.
quick = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settled = settings(quick, max_examples=4)


class Batch(NamedTuple):
    """``S`` sequences, one row each of ``[S, L]``; behind its length a row holds nothing."""

    lengths: list
    groups: list
    parts: list  # (rank, sequences) of each micro-batch
    ranks: int
    scale: float
    packed: bool
    empty_rows: bool
    seed: int


@st.composite
def batches(draw):
    count = draw(st.integers(1, 6))
    ranks, micro = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    places = [draw(st.integers(0, ranks * micro - 1)) for _ in range(count)]
    order = draw(st.permutations(range(count)))
    parts = [(p // micro, [s for s in order if places[s] == p]) for p in range(ranks * micro)]
    return Batch(
        [draw(st.integers(1, 6)) for _ in range(count)],
        [draw(st.integers(0, 2)) for _ in range(count)],
        parts,
        ranks,
        draw(st.sampled_from([1.0, 0.25])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


def data(batch, dtype):
    """Columns ``[S, L, ...]``, with dead tokens inside the sequences; what requires a gradient is a leaf."""
    g = torch.Generator().manual_seed(batch.seed)
    shape = len(batch.lengths), max(batch.lengths)
    inside = torch.arange(shape[1]) < torch.tensor(batch.lengths)[:, None]
    d = {
        "mask": inside & (torch.rand(shape, generator=g) < 0.8),
        "inside": inside,
        "targets": torch.randint(0, V, shape, generator=g),
    }
    d["logp"] = (-3 * torch.rand(shape, generator=g)).to(dtype)
    for name in ("old", "ref"):
        d[name] = d["logp"] + 0.3 * torch.randn(shape, generator=g).to(dtype)
    for name in ("advantages", "values", "returns"):
        d[name] = torch.randn(shape, generator=g).to(dtype)
    d["old_values"] = d["values"] + 0.3 * torch.randn(shape, generator=g).to(dtype)
    d["weights"], d["entropy"] = (torch.rand(shape, generator=g).to(dtype) for _ in range(2))
    d["logits"], d["hidden"] = (torch.randn(*shape, n, generator=g).to(dtype) for n in (V, H))
    d["matrix"] = torch.randn(V, H, generator=g).to(dtype)
    for name in ("logp", "entropy", "values", "logits", "hidden", "matrix"):
        d[name] = d[name].clone().requires_grad_()
    return d


def normalizers(mode, batch, mask):
    """The totals of the whole batch, by hand; per-sequence ones as ``[S]``."""
    tokens, groups = mask.sum(-1), torch.tensor(batch.groups)
    same = groups[:, None] == groups
    counted = torch.ones_like(tokens) if batch.empty_rows else (tokens > 0).long()
    rows, kinds = int(counted.sum()), len({g for g, c in zip(batch.groups, counted.tolist(), strict=True) if c})
    of_group = same.long() @ tokens
    found = {
        "token-mean": {"batch_num_tokens": int(tokens.sum())},
        "global-token-mean": {"batch_num_tokens": float(tokens.sum())},
        "token-sum": {},
        "seq-mean-token-sum-norm": {"num_sequences": rows, "horizon": 9},
        "fixed-horizon": {"num_sequences": len(tokens), "horizon": 9},
        "prompt-mean": {"num_sequences": kinds, "group_ids": groups, "group_tokens": of_group},
        "rollout-mean": {"num_sequences": len(tokens), "rollout_ids": groups, "group_tokens": of_group},
        "group-mean": {"num_sequences": kinds, "group_ids": groups, "group_rows": same.long() @ counted},
    }.get(mode, {"num_sequences": rows})
    return {**found, "count_empty_rows": batch.empty_rows}


WHOLE = {
    "seq-mean-token-sum-norm": ("horizon",),
    "fixed-horizon": ("horizon",),
    "global-token-mean": ("batch_num_tokens",),
}


def whole(mode, options):
    """What the loss of the whole batch is told: the normalisers that it cannot find by itself."""
    kept = (*WHOLE.get(mode, ()), "group_ids", "rollout_ids", "count_empty_rows")
    return {name: x for name, x in options.items() if name in kept}


def cut(x, d, sequences, packed):
    """A column of some sequences: as many tokens as the longest of them has and two of padding, or without padding."""
    inside = d["inside"][sequences]
    if packed:
        return x[sequences][inside]
    length = int(inside.sum(-1).max())
    rows = x[sequences][:, :length]
    return torch.cat([rows, rows.new_zeros(rows.shape[0], 2, *rows.shape[2:])], 1)


def check(call, leaves, mode, batch, d, level="token"):
    """``call(column, more)``: the loss of what ``column`` gives by name; ``more``: aggregation, normalisers and
    offsets.
    """
    mode = "seq-mean" if level == "sequence_sum" and mode == "token-mean" else mode

    def loss(sequences, packed, given):
        lengths = d["inside"][sequences].sum(-1)
        offsets = {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])} if packed else {}

        def column(name):
            return d[name] if d[name].dim() == 2 and name == "matrix" else cut(d[name], d, sequences, packed)

        if mode == "weights":
            return call(
                column, {"weights": column("weights") * given.get("scale", 1.0) * given.get("dp_size", 1), **offsets}
            )
        given = {name: x[sequences] if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        return call(column, {"aggregation": mode, "normalizers": given, **offsets})

    options, inputs = normalizers(mode, batch, d["mask"]), [d[name] for name in leaves]
    every = list(range(len(batch.lengths)))
    want = loss(every, False, whole(mode, options))
    share = {**options, "dp_size": batch.ranks, "scale": batch.scale}
    parts = [
        loss(sequences, batch.packed, share) / (batch.ranks * batch.scale) for _, sequences in batch.parts if sequences
    ]
    where = f"{mode}, {level}"
    unit = 2e-6 if want.dtype == torch.float32 else 1e-12
    assert abs(sum(parts) - want) <= unit * (sum(abs(p) for p in parts) + abs(want)), (
        f"{where}: the parts are {parts}, the whole is {want}"
    )
    expected = torch.autograd.grad(want, inputs, allow_unused=True)
    found = [torch.autograd.grad(p, inputs, allow_unused=True) for p in parts]
    for name, truth, *gradients in zip(leaves, expected, *found, strict=True):
        gradients = [g for g in gradients if g is not None]
        if truth is None:
            assert not any(g.any() for g in gradients), f"{where}: {name} moves in a part alone"
            continue
        size = sum(g.abs() for g in gradients) + truth.abs()
        # An element of a product is a sum whose terms cancel: it has the digits of the largest element beside it.
        error, allowed = (
            (sum(gradients) - truth).abs(),
            unit * (size if truth.dim() == 2 and name != "matrix" else size.max()),
        )
        assert (error <= allowed).all(), (
            f"{where}: the gradients of {name} in parts are {error.max():.3g} away from the whole's"
        )


def terms(draw):
    """The options of the KL and of the entropy term, each there or not."""
    kl = {"kl_coef": 0.3, "kl": draw(st.sampled_from(["k1", "k2", "k3"]))} if draw(st.booleans()) else {}
    return kl, {"entropy_coef": draw(st.sampled_from([-0.2, 0.4]))} if draw(st.booleans()) else {}


def policy(function, column, kl, entropy, **options):
    reference = {**kl, "ref_logprobs": column("ref")} if kl else {}
    state = column("old"), column("advantages"), column("mask")
    if "rollout_logp" in OBJECTIVES[options["objective"]].columns:
        options["rollout_logprobs"] = column("old")
    if function == "policy_loss":
        given = {**entropy, "entropy": column("entropy")} if entropy else {}
        return rlk.policy_loss(column("logp"), *state, **reference, **given, **options)
    if function == "logits_policy_loss":
        return rlk.logits_policy_loss(column("logits"), column("targets"), *state, **reference, **entropy, **options)
    return rlk.linear_policy_loss(
        column("hidden"),
        column("matrix"),
        column("targets"),
        *state,
        chunk_tokens=16,
        **reference,
        **entropy,
        **options,
    )


LEAVES = {
    "policy_loss": ["logp", "entropy"],
    "logits_policy_loss": ["logits"],
    "linear_policy_loss": ["hidden", "matrix"],
}


@pytest.mark.fault(125)
@pytest.mark.parametrize("mode", WITH_WEIGHTS)
@pytest.mark.parametrize("function", LEAVES)
def test_every_term_of_a_policy_loss_is_additive_over_any_split(function, mode):
    """Every objective at every level of ratio, with and without KL and entropy."""
    linear = function == "linear_policy_loss"

    @(settled if linear else quick)
    @given(batches(), st.data())
    def run(batch, drawn):
        # fp64 where a part's products round otherwise than the whole's: the 2e-6 are for what is left out or counted
        # twice.
        d = data(batch, torch.float32 if function == "policy_loss" and drawn.draw(st.booleans()) else torch.float64)
        kl, entropy = terms(drawn.draw)
        # Not all in each example, because the table has grown: what is wrong in one aggregation is wrong in most of
        # them.
        for name in ("ppo_clip", *drawn.draw(st.sets(st.sampled_from(POLICIES), min_size=2, max_size=2))):
            for level in LEVELS if "old_logp" in OBJECTIVES[name].columns else ("token",):
                check(
                    lambda column, more, name=name, level=level: policy(
                        function, column, kl, entropy, objective=name, ratio_level=level, **SETTINGS[name], **more
                    ),
                    LEAVES[function],
                    mode,
                    batch,
                    d,
                    level,
                )

    run()


def of_sequences(column, more):
    """The rewards that stand for advantages, one of each sequence, and four drawn for it."""
    offsets = {"cu_seqlens": more["cu_seqlens"]} if "cu_seqlens" in more else {}
    means = [rlk.sequence_means(column(name), column("inside"), **offsets) for name in ("advantages", "old", "ref")]
    return {"rewards": means[0], "value_pool": torch.stack(means, -1), "ref_logprobs": column("ref")}


def of_rows(name, column, more):
    if name == "a2po":
        given = of_sequences(column, more)
        return rlk.policy_loss(column("logp"), None, None, column("mask"), objective=name, **given, **more)
    return rlk.policy_loss(column("logp"), column("old"), column("advantages"), column("mask"), objective=name, **more)


@pytest.mark.fault(125)
@pytest.mark.parametrize("mode", WITH_WEIGHTS)
def test_objectives_of_tokens_and_sequences_and_corrections_are_additive_over_any_split(mode):
    """Not those of the batch: KL-Cov, Clip-Cov, a quantile of entropies, a mean of weights without ``batch_mean``."""
    correction = rlk.Correction(level="sequence", high=2.0, opsm_delta=0.01)

    @settled
    @given(batches())
    def run(batch):
        d = data(batch, torch.float64)
        for name in ("gmpo", "vespo", "fipo", "a2po"):
            level = "sequence_sum" if name in ("gmpo", "a2po") else "token"
            check(lambda column, more, name=name: of_rows(name, column, more), ["logp"], mode, batch, d, level)
        check(
            lambda column, more: policy(
                "policy_loss",
                column,
                {},
                {},
                objective="ppo_clip",
                rollout_logprobs=column("ref"),
                correction=correction,
                **more,
            ),
            ["logp"],
            mode,
            batch,
            d,
        )

    run()


@pytest.mark.fault(125)
def test_an_objective_of_groups_is_additive_where_no_group_is_cut():
    draw = torch.Generator().manual_seed(0)
    logp, old = (torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    advantages, groups = torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64), torch.tensor([3, 1, 3, 7, 1, 3])

    def loss(rows, **options):
        return rlk.policy_loss(
            logp[rows], old[rows], advantages[rows], objective="real", group_ids=groups[rows], **options
        )

    parts = [loss(torch.isin(groups, torch.tensor(ids)), normalizers={"num_sequences": 3}) for ids in ([3], [1, 7])]
    torch.testing.assert_close(sum(parts), loss(slice(None)))


OTHERS = {
    "value_loss": (
        ["values"],
        lambda c, more: rlk.value_loss(c("values"), c("old_values"), c("returns"), c("mask"), clip_range=0.2, **more),
    ),
    "logprobs_sft_loss": (
        ["logp"],
        lambda c, more: rlk.logprobs_sft_loss(c("logp"), c("mask"), sample_weights=c("weights"), **more),
    ),
    "sft_loss": (["logits"], lambda c, more: rlk.sft_loss(c("logits"), c("targets"), c("mask"), kind="dft", **more)),
    "linear_sft_loss": (
        ["hidden", "matrix"],
        lambda c, more: rlk.linear_sft_loss(c("hidden"), c("matrix"), c("targets"), c("mask"), **more),
    ),
}


@pytest.mark.fault(125)
@pytest.mark.parametrize("mode", WITH_WEIGHTS)
@pytest.mark.parametrize("function", OTHERS)
def test_other_losses_of_tokens_are_additive_over_any_split(function, mode):
    leaves, call = OTHERS[function]

    @quick
    @given(batches(), st.booleans())
    def run(batch, wide):
        check(call, leaves, mode, batch, data(batch, torch.float64 if wide or leaves != ["values"] else torch.float32))

    run()


@pytest.mark.fault(125)
def test_the_bonus_of_three_micro_batches_is_that_of_the_batch(backend):
    """Entropies of 1 and a coefficient of 1: a bonus of -1 where every sequence or token is counted once."""
    z, ones, mask = torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
    for mode, bonus in (("token-mean", -1.0), ("seq-mean-token-mean", -1.0), ("seq-mean-token-sum", -4.0)):
        totals = {"batch_num_tokens": 12} if mode == "token-mean" else {"num_sequences": 3}
        found = [
            rlk.policy_loss(z, z, z, mask, aggregation=mode, normalizers=totals, entropy=ones, entropy_coef=1.0)
            for _ in range(3)
        ]
        assert sum(found).item() == pytest.approx(bonus, rel=2e-6)


@pytest.mark.fault(125)
def test_the_bonus_follows_scale_and_ranks(backend):
    z, ones = torch.zeros(2, 3), torch.ones(2, 3)
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean"):
        loss = rlk.policy_loss(
            z, z, z, aggregation=mode, normalizers={"dp_size": 4, "scale": 0.5}, entropy=ones, entropy_coef=1.0
        )
        assert loss.item() == pytest.approx(-2.0, rel=2e-6)
