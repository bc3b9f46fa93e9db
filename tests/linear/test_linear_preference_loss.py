"""Preference losses of the head, paired and unpaired: every type against its formula over all logits in float64."""

import linear_problems as problems
import preference_oracles as oracle
import pytest
import torch
from linear_problems import assert_gradients, assert_loss, gradients, own, problem
from reference import same_bits

import rlkernels as rlk
from rlkernels.linear import chunked_loss
from rlkernels.losses.preference_options import F_DIVERGENCES
from rlkernels.losses.preference_types import KINDS
from rlkernels.losses.unpaired_preference import LOSS_TYPES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OF_TOKENS = ("chosen_logps", "rejected_logps", "logits_chosen", "logits_rejected", "entropy", "token_accuracy")
P, BETA, SMOOTHING = 4, 0.4, 0.1
HEAD = {"temperature": 0.8, "softcap": 6.0, "logit_scale": 1.2}
CU = torch.tensor([0, 6, 9, 10, 14, 20, 25, 27, 33])  # eight answers, one of a single token
# All pairs at once; one or two; every pair outgrows its chunk; a bound (at most 48 are live) that fits in a chunk, and
# one that does not.
CHUNKS = (
    {},
    {"chunk_tokens": 12},
    {"chunk_tokens": 3},
    {"max_live_tokens": 48},
    {"max_live_tokens": 48, "chunk_tokens": 20},
)


def batch(dtype=torch.float32, packed=False, seed=0, count=2 * P):
    """Answers, and sums under a reference that is near the policy."""
    d = problem(dtype, (33,) if packed else (count, 6), seed=seed, **HEAD)
    d["cu_seqlens"] = CU if packed else None
    if packed:
        d["mask"][CU[:-1]] = True
    sums, _ = problems.answers(d, problems.leaves(d), d["cu_seqlens"], **HEAD)
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    d["reference"] = (sums.detach() + noise).to(d["old"].dtype)
    return d


def options_for(names, **more):
    names = (names,) if isinstance(names, str) else names
    options = {"beta": BETA, "loss_type": names if len(names) > 1 else names[0], **more}
    if oracle.SMOOTHED & set(names):
        options["label_smoothing"] = SMOOTHING
    return options | oracle.further(names, P)


def truth_of(d, operands, names, coefficients=None, pair_weights=None, divergence="reverse_kl", averaged=False):
    sums, n = problems.answers(d, operands, d["cu_seqlens"], **HEAD)
    count, chosen_tokens, n, reference = (
        len(sums) // 2,
        n[: len(sums) // 2].sum(),
        n.clamp(min=1),
        d["reference"].double(),
    )
    halves = [x[half] for half in (slice(None, count), slice(count, None)) for x in (sums, reference, n)]
    C, f, n, R, g, m = halves
    names, total = (names,) if isinstance(names, str) else names, torch.zeros(count, dtype=torch.float64)
    for name, coefficient in zip(names, coefficients or (1.0,) * len(names), strict=True):
        losses = problems.pairs(
            name, C, R, f, g, n, m, beta=BETA, smoothing=SMOOTHING, divergence=divergence, averaged=averaged
        )
        total = total + coefficient * (losses - problems.likelihood(name) * C * count / chosen_tokens)
    return total if pair_weights is None else pair_weights.double() * total


def loss_of(d, operands, names, references=True, **options):
    count = len(d["reference"]) // 2
    if references:
        options |= {"ref_chosen_logps": d["reference"][:count], "ref_rejected_logps": d["reference"][count:]}
    return rlk.linear_dpo_loss(
        operands[0],
        operands[1],
        d["targets"],
        d["mask"],
        bias=operands[2],
        cu_seqlens=d["cu_seqlens"],
        **HEAD,
        **options_for(names, **options),
    )


def judge(
    d, names, chunks=CHUNKS, coefficients=None, pair_weights=None, divergence="reverse_kl", averaged=False, **options
):
    wide, operands = problems.leaves(d), own(d)
    losses = truth_of(d, wide, names, coefficients, pair_weights, divergence, averaged)
    truth, size = losses.mean(), losses.abs().mean().item()
    want = gradients(truth, wide, -2.3)
    given = {
        "loss_weights": coefficients,
        "pair_weights": pair_weights,
        "f_divergence": divergence,
        "length_normalized": averaged,
        **options,
    }
    for chunk in chunks:
        loss = loss_of(d, operands, names, **chunk, **given)
        assert loss.dtype == d["old"].dtype
        assert_loss(loss, truth, size)
        assert_gradients(gradients(loss, operands, -2.3), want, slope=1 + BETA / 0.05 if names == "discopop" else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", KINDS)
def test_every_type_is_its_formula_over_all_logits(name, packed, dtype, backend):
    judge(batch(dtype, packed), name, references=KINDS[name].reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixtures_and_weights_of_pairs(dtype, backend):
    d, weights = batch(dtype, True), torch.tensor([0.5, 0.0, 2.0, 1.3])
    judge(d, ("sigmoid", "sft"), coefficients=(1.0, 0.3))
    judge(d, ("exo_pair", "bco_pair", "orpo"), coefficients=(1.0, -0.5, 2.0))
    judge(d, ("ipo", "sigmoid_norm"), pair_weights=weights)
    judge(d, ("cpo", "simpo"), pair_weights=weights, references=False)
    judge(d, ("sigmoid", "aot"), coefficients=(0.5, 1.0))


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("averaged", [False, True], ids=["sums", "averages"])
@pytest.mark.parametrize("name", oracle.OF_MARGIN)
def test_every_divergence_and_averages_per_token(name, averaged, divergence, backend):
    judge(batch(torch.float32), name, divergence=divergence, averaged=averaged, chunks=CHUNKS[1:])


def test_lengths_of_the_caller_take_the_place_of_the_live_tokens(backend):
    d, lengths = batch(torch.float32), torch.tensor([3.0, 1.0, 9.0, 4.0])
    sums, _ = problems.answers(d, problems.leaves(d), **HEAD)
    C, R, f, g = sums[:P], sums[P:], *d["reference"].double().view(2, P)
    want = problems.pairs("sigmoid_norm", C, R, f, g, lengths, lengths + 1, beta=BETA).mean()
    assert_loss(loss_of(d, own(d), "sigmoid_norm", chosen_lengths=lengths, rejected_lengths=lengths + 1), want)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("names", ["sigmoid", "orpo", ("cpo", "simpo"), "aot"], ids=str)
def test_metrics_are_those_of_the_true_sums(names, packed, backend):
    d, weights = batch(torch.float32, packed), torch.tensor([1.0, 0.0, 2.0, 1.0])
    sums, n = problems.answers(d, problems.leaves(d), d["cu_seqlens"], **HEAD)
    given = options_for(names, pair_weights=None if names == "aot" else weights)
    halves = [x.detach()[half] for x in (sums, d["reference"].double()) for half in (slice(None, P), slice(P, None))]
    _, want = rlk.dpo_loss(*halves, chosen_lengths=n[:P], rejected_lengths=n[P:], return_metrics=True, **given)
    for chunk in CHUNKS:
        loss, metrics = loss_of(d, own(d), names, **chunk, return_metrics=True, pair_weights=given["pair_weights"])
        assert (
            metrics.keys() == {*want, *OF_TOKENS}
            and loss.requires_grad
            and not any(x.requires_grad for x in metrics.values())
        )
        for name, value in want.items():
            assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name


def test_answers_without_a_live_token_are_answers_of_probability_one(backend):
    d = batch(torch.float32)
    d["mask"][0], d["mask"][P], d["mask"][P + 2] = False, False, False  # both answers of a pair; one of another
    for name in ("sigmoid", "sigmoid_norm", "sft", "nca_pair"):
        judge(d, name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_law_2_a_pair_of_weight_0_is_left_out_whatever_it_holds_and_enters_no_product(poison, backend, monkeypatch):
    d, weights, entered = batch(torch.float32), torch.tensor([0.5, 0.0, 2.0, 1.3]), []
    clean = {k: v if v is None else v.clone() for k, v in d.items()}
    d["hidden"][1], d["hidden"][P + 1], d["reference"][1] = poison, poison, poison
    logits = chunked_loss.ChunkLoop.logits
    monkeypatch.setattr(
        chunked_loss.ChunkLoop,
        "logits",
        lambda self, rows: (
            entered.append(rows.index if rows.padding is None else rows.index[~rows.padding]) or logits(self, rows)
        ),
    )
    for name in ("sigmoid", "ipo", "orpo", "sft"):
        for chunk in CHUNKS:
            results = []
            for inputs in (d, clean):
                operands = own(inputs)
                loss, metrics = loss_of(inputs, operands, name, pair_weights=weights, **chunk, return_metrics=True)
                results.append([loss.detach(), *gradients(loss, operands), *metrics.values()])
            assert all(same_bits(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True)), name
    rows = set(torch.cat(entered).tolist())
    assert rows == set(
        ((problems.live_of(d) & (torch.arange(2 * P) % P != 1)[:, None]).view(-1).nonzero()[:, 0]).tolist()
    )


GOOD = torch.tensor([True, False, True, True, False, True, False, False])
UNPAIRED = [
    ("kto", {"kl": 0.3}),
    ("kto", {"kl": torch.tensor(0.2)}),
    ("kto", {"kl_logps": torch.tensor([-3.0, -4.0]), "ref_kl_logps": torch.tensor([-3.5, -4.1])}),
    ("apo_zero_unpaired", {}),
    ("bco", {"delta": 0.1}),
    ("kto_paired_batch", {}),
]


def unpaired_truth(d, operands, name, up=1.0, down=1.0, kl=0.0, delta=0.0, kl_logps=None, ref_kl_logps=None):
    sums, _ = problems.answers(d, operands, d["cu_seqlens"], **HEAD)
    rho = sums - d["reference"].double()
    if kl_logps is not None:
        kl = (kl_logps - ref_kl_logps).double().mean().clamp(min=0)
    if name == "kto_paired_batch":
        name, kl = "kto", torch.where(GOOD, rho[~GOOD].mean().clamp(min=0), rho[GOOD].mean().clamp(min=0))
    return torch.where(GOOD, torch.tensor(up, dtype=torch.float64), down) * oracle.OF_ONE[name](
        rho, GOOD, BETA, kl, delta
    )


def unpaired(d, operands, name, **options):
    return rlk.linear_unpaired_preference_loss(
        operands[0],
        operands[1],
        d["targets"],
        d["reference"],
        GOOD,
        d["mask"],
        bias=operands[2],
        cu_seqlens=d["cu_seqlens"],
        loss_type=name,
        beta=BETA,
        **HEAD,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name,options", UNPAIRED, ids=[f"{n} {' '.join(o)}".strip() for n, o in UNPAIRED])
def test_every_unpaired_type_is_its_formula_over_all_logits(name, options, packed, dtype, backend):
    assert {n for n, _ in UNPAIRED} == set(LOSS_TYPES)
    d = batch(dtype, packed)
    for up, down in ((1.0, 1.0), (0.7, 1.6), (0.0, 1.0)):
        wide, operands = problems.leaves(d), own(d)
        truth = unpaired_truth(d, wide, name, up, down, **options).mean()
        want = gradients(truth, wide, 1.7)
        for chunk in CHUNKS:
            loss = unpaired(d, operands, name, **chunk, desirable_weight=up, undesirable_weight=down, **options)
            assert_loss(loss, truth)
            assert_gradients(gradients(loss, operands, 1.7), want)


def test_metrics_of_unpaired_answers_are_those_of_the_true_sums(backend):
    d = batch(torch.float32)
    sums, _ = problems.answers(d, problems.leaves(d), **HEAD)
    for name, options in UNPAIRED:
        for weights in ({}, {"undesirable_weight": 0.0}):
            _, want = rlk.unpaired_preference_loss(
                sums.detach(),
                d["reference"].double(),
                GOOD,
                loss_type=name,
                beta=BETA,
                return_metrics=True,
                **weights,
                **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()},
            )
            for chunk in ({"chunk_tokens": 5}, *CHUNKS[3:]):
                loss, metrics = unpaired(d, own(d), name, return_metrics=True, **chunk, **weights, **options)
                assert metrics.keys() == want.keys() and loss.requires_grad
                for key, value in want.items():
                    assert metrics[key].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), (name, key)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["hidden", "reference"])
def test_law_2_a_class_of_weight_0_is_left_out_whatever_it_holds(of, poison, backend):
    d = batch(torch.float32)
    clean = {k: v if v is None else v.clone() for k, v in d.items()}
    d[of][~GOOD] = poison
    for name, options in UNPAIRED:
        if name == "kto_paired_batch":
            continue  # every answer sets the baseline of the other class
        for metrics, chunk in [(m, c) for m in (False, True) for c in ({"chunk_tokens": 4}, *CHUNKS[3:])]:
            results = []
            for inputs in (d, clean):
                operands = own(inputs)
                loss = unpaired(
                    inputs, operands, name, undesirable_weight=0.0, return_metrics=metrics, **chunk, **options
                )
                loss = loss[0] if metrics else loss
                results.append([loss.detach(), *gradients(loss, operands)])
            assert all(same_bits(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True)), name


def test_no_pair_and_no_answer_cost_nothing(backend):
    for shape in ((0, 5), (8, 0)):
        d = problem(shape=shape)
        d["cu_seqlens"], d["reference"] = None, torch.zeros(shape[0])
        operands = own(d)
        for options in ({}, {"max_live_tokens": 1}):
            loss = loss_of(d, operands, "sigmoid", **options)
            assert loss.item() == (0.0 if shape[0] == 0 else pytest.approx(0.9 * 0.6931472 + 0.1 * 0.6931472))
            assert all(not g.any() for g in gradients(loss, operands))
            if shape[0]:
                assert unpaired(d, operands, "bco", delta=0.0, **options).item() == pytest.approx(0.6931472)
