"""``linear_policy_loss``: value and gradients of every objective and option against all logits in float64."""

import linear_problems as problems
import pytest
import torch
from linear_problems import PARAMS, B, H, L, V, assert_gradients, assert_loss, gradients, own, problem
from reference import same_bits

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, objective

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
UPSTREAM = (1.0, -0.37, 0.0, 2.0**16)
CU = torch.tensor([0, 5, 5, 6, 14, 21])  # an empty sequence, one of a single token


@objective
def linear_squared(logp, old_logp, advantage, pull):
    """Follows the advantage, held near the old policy."""
    gap = logp - old_logp
    value = -advantage * logp + 0.5 * pull * gap * gap
    return value, -advantage + pull * gap


USERS = OBJECTIVES.pop("linear_squared")  # collected beside other tests: registered for the tests of this file alone


@pytest.fixture(autouse=True)
def users_objective(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "linear_squared", USERS)


def loss_of(d, operands, *, objective="ppo_clip", aggregation_="token-mean", advantages=None, kl_coef=0.0, **options):
    """Ours, with what ``problems.policy`` takes."""
    if kl_coef:
        options |= {"kl_coef": kl_coef, "ref_logprobs": d["ref"]}
    A = d["advantages"] if advantages is None else advantages
    return rlk.linear_policy_loss(
        operands[0],
        operands[1],
        d["targets"],
        d["old"],
        A,
        d["mask"],
        bias=operands[2],
        objective=objective,
        aggregation=aggregation_,
        **PARAMS[objective],
        **options,
    )


def judge(d, bias=True, upstream=(-0.37,), execution=None, size=1.0, **options):
    """``execution``: options that must not change the result; ``size``: of the terms that the loss is a sum of."""
    wide, operands = problems.leaves(d, bias), own(d, bias)
    truth = problems.policy(d, wide, **options)
    of_one = gradients(truth, wide)
    for g in upstream:
        loss = loss_of(d, operands, **options, **(execution or {}))
        assert loss.dtype == (torch.float64 if d["hidden"].dtype == torch.float64 else torch.float32)
        assert_loss(loss, truth, size)
        got, want = gradients(loss, operands, g), [g * x for x in of_one]
        assert [x.dtype for x in got] == [x.dtype for x in operands if x is not None]
        if d["hidden"].dtype == torch.float16 and max(x.abs().max() for x in want) > 65504:
            assert any(x.isinf().any() for x in got)  # F44: a gradient scaler must see it
        else:
            assert_gradients(got, want, bonus=bool(options.get("entropy_coef")))


def state_options(d, name):
    """Options by name; those that need tensors of the problem are made here."""
    return OPTIONS[name](d) if callable(OPTIONS[name]) else OPTIONS[name]


# A problem, for the names of its options alone.
BLANK = {"temperature": 1.0, "token_weights": 0.0, "advantages": torch.zeros(1, 1)}


def test_every_objective_of_a_policy_is_tested():
    assert set(PARAMS) == {
        name
        for name, entry in OBJECTIVES.items()
        if entry.columns[0] == "logp" and not {"ref_logp", "rollout_logp"} & set(entry.columns)
    } - {"nll", "dft"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PARAMS)
def test_every_objective_at_every_level_is_that_of_all_logits(name, level, dtype, backend):
    if level != "token" and name == "reinforce":
        return  # no ratio; that this raises is a row of the bad inputs
    # The log-probability of a whole sequence is about -50: CISPO and DPPO multiply by it what the rounded logits move
    # the ratio by, and the signs cancel.
    size = 10.0 if level == "sequence_sum" and name.startswith(("cispo", "dppo")) else 1.0
    for seed in range(2):
        judge(
            problem(dtype, seed=seed),
            upstream=UPSTREAM if seed == 0 else (0.7,),
            size=size,
            objective=name,
            ratio_level=level,
            execution={"chunk_tokens": 5},
        )


OPTIONS = {
    "k1": {"kl": "k1", "kl_coef": 0.3},
    "k2": {"kl": "k2", "kl_coef": 0.3},
    "k3": {"kl": "k3", "kl_coef": -0.3},
    "an entropy bonus": {"entropy_coef": 0.2},
    "an entropy bonus and a KL": {"entropy_coef": -0.1, "kl": "k2", "kl_coef": 0.3},
    "a temperature": {"temperature": 0.6},
    "a softcap": {"softcap": 4.0},
    "a scale": {"logit_scale": 0.7},
    "a softcap, a scale and a temperature": {"softcap": 4.0, "logit_scale": 1.7, "temperature": 1.4},
    "padding behind the vocabulary": {"valid_vocab": 121},
    "another ignored index": {"ignore_index": 7},
    "weights": lambda d: {"weights": d["token_weights"] - 0.3},
    "weights with an entropy bonus": lambda d: {"weights": d["token_weights"], "entropy_coef": 0.1},
    "a temperature per token": lambda d: {"temperature": d["temperature"]},
    "an advantage per sequence": lambda d: {"advantages": d["advantages"][:, 0]},
    "a column of advantages": lambda d: {"advantages": d["advantages"][:, :1]},
    "everything at once": lambda d: {
        "temperature": d["temperature"],
        "softcap": 5.0,
        "logit_scale": 1.3,
        "valid_vocab": 121,
        "kl": "k3",
        "kl_coef": 0.2,
        "entropy_coef": 0.1,
        "aggregation_": "seq-mean-token-mean",
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_that_of_all_logits(name, bias, dtype, backend):
    head = {k: v for k, v in state_options(BLANK, name).items() if k in problems.HEAD}
    d = problem(dtype, **head)
    options = state_options(d, name)
    for level in ("token", "sequence"):
        judge(d, bias, ratio_level=level, execution={"chunk_tokens": 8}, **options)
        # A sequence's ratio takes three products where the bound fits, else four.
        for chunk in ({}, {"chunk_tokens": 16}):
            judge(d, bias, ratio_level=level, execution={"max_live_tokens": 20, **chunk}, **options)


IDS = torch.tensor([4, 1, 4])
MODES = [
    ("token-mean", {}),
    ("token-mean", {"batch_num_tokens": 31}),
    ("token-sum", {}),
    ("global-token-mean", {"batch_num_tokens": 40.0}),
    ("seq-mean-token-mean", {}),
    ("seq-mean-token-mean", {"num_sequences": 8}),
    ("seq-mean-token-sum", {}),
    ("seq-mean-token-sum", {"num_sequences": 5}),
    ("seq-mean-token-sum-norm", {}),
    ("seq-mean-token-sum-norm", {"horizon": 9}),
    ("fixed-horizon", {"horizon": 12}),
    ("prompt-mean", {"group_ids": IDS}),
    ("rollout-mean", {"rollout_ids": IDS}),
    ("seq-mean", {}),
    ("group-mean", {"group_ids": IDS}),
]


@pytest.mark.parametrize("mode,normalizers", MODES, ids=[f"{mode} {' '.join(n)}".strip() for mode, n in MODES])
def test_every_aggregation_weighs_all_terms(mode, normalizers, backend):
    assert {m for m, _ in MODES} == set(rlk.aggregation.AGGREGATIONS)
    for dtype in (torch.float32, torch.bfloat16):
        d = problem(dtype)
        d["mask"][1] = False  # a sequence without a live token
        for level in ("token", "sequence_token", "sequence_sum"):
            if level == "sequence_sum" and (mode, "batch_num_tokens" in normalizers) == ("token-mean", True):
                continue  # the mean is one over sequences there: refused
            judge(
                d,
                ratio_level=level,
                aggregation_=mode,
                normalizers=normalizers,
                kl_coef=0.2,
                entropy_coef=0.1,
                execution={"chunk_tokens": 6},
            )
            judge(
                d,
                ratio_level=level,
                aggregation_=mode,
                normalizers=normalizers,
                kl_coef=0.2,
                entropy_coef=0.1,
                execution={"max_live_tokens": 20},
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_a_packed_batch_with_an_empty_sequence_and_one_of_one_token(level, dtype, backend):
    d = problem(dtype, shape=(21,), seed=3)
    d["mask"][:6] = True
    for mode in ("token-mean", "seq-mean-token-mean"):
        for execution in (
            {"chunk_tokens": 3},
            {"chunk_tokens": 9},
            {},
            {"max_live_tokens": 30},
            {"max_live_tokens": 20, "chunk_tokens": 7},
        ):
            judge(d, ratio_level=level, aggregation_=mode, cu_seqlens=CU, kl_coef=0.1, execution=execution)
            judge(
                d,
                ratio_level=level,
                aggregation_=mode,
                cu_seqlens=CU,
                advantages=d["advantages"][:5].clone(),
                execution=execution,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_padding_behind_the_vocabulary_take_no_part_whatever_they_hold(dtype, backend):
    d = problem(dtype, valid_vocab=121)
    for level in ("token", "sequence"):
        results = []
        for filling in (0.0, 50.0, float("nan"), float("inf")):
            d["weight"][121:], d["bias"][121:] = filling, filling
            operands = own(d)
            loss = loss_of(d, operands, ratio_level=level, valid_vocab=121, chunk_tokens=8)
            results.append([loss.detach(), *gradients(loss, operands)])
            assert not results[-1][2][121:].any() and not results[-1][3][121:].any() and results[-1][2][:121].any()
        assert all(same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    with pytest.raises(IndexError, match=r"target 125 at row 0 is outside \[0, 121\)"):
        loss_of({**d, "targets": d["targets"].new_full((B, L), 125)}, own(d), valid_vocab=121)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_metrics_are_those_of_all_logits(level, dtype, backend):
    d = problem(dtype)
    z = (d["hidden"].double() @ d["weight"].double().t() + d["bias"].double()) / 0.7
    live, (logp, entropy) = problems.live_of(d), problems.rows(d, problems.leaves(d), temperature=0.7)
    old, A, n = d["old"].double(), d["advantages"], live.sum()
    gap = torch.where(live, logp.detach() - old, 0.0)
    spread = {"token": gap, "sequence_sum": gap.sum(-1, keepdim=True).expand(B, L)}.get(
        level, (gap.sum(-1) / live.sum(-1))[:, None].expand(B, L)
    )
    ratio, k = spread.exp(), d["ref"].double() - logp.detach()
    low, high = (ratio < 0.8) & (A < 0) & live, (ratio > 1.28) & (A > 0) & live
    want = {
        "ppo_kl": -gap.sum() / n,
        "approx_kl": (gap**2).sum() / 2 / n,
        "ratio": ratio[live].mean(),
        "ratio_min": ratio[live].min(),
        "ratio_max": ratio[live].max(),
        "clip_fraction_low": low.sum() / n,
        "clip_fraction_high": high.sum() / n,
        "clip_fraction": (low | high).sum() / n,
        "kl": (k.expm1() - k)[live].mean(),
        "entropy": entropy[live].mean().detach(),
    }
    if level != "token":  # shares of sequences, each of which has a live token
        for kind, clipped in (("_low", low), ("_high", high), ("", low | high)):
            want[f"seq_clip_fraction{kind}"] = (clipped.sum(-1) / live.sum(-1)).mean()
    assert z.shape[-1] == V and live.sum() < B * L
    for coefficient in (0.0, 0.1):  # the entropy is a metric with and without a bonus
        loss, metrics = loss_of(
            d,
            own(d),
            ratio_level=level,
            temperature=0.7,
            kl_coef=0.1,
            entropy_coef=coefficient,
            chunk_tokens=8,
            return_metrics=True,
        )
        assert (
            metrics.keys() == want.keys() and loss.requires_grad and not any(x.requires_grad for x in metrics.values())
        )
        for name, value in want.items():
            assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), (name, coefficient)


def test_metrics_count_the_tokens_that_were_read(backend):
    d = problem()
    dropped = torch.zeros(B, L, dtype=torch.bool)
    dropped[:, ::2] = True
    weights = d["token_weights"].masked_fill(dropped, 0.0)
    _, metrics = loss_of(d, own(d), weights=weights, return_metrics=True)
    d["mask"] = d["mask"] & ~dropped
    _, want = loss_of(d, own(d), weights=weights, return_metrics=True)
    for name, value in want.items():
        assert same_bits(metrics[name], value), name


def test_a_gradient_step_raises_the_likelihood_of_a_rewarded_token(backend):
    d = problem(shape=(1, 1), hidden=H)
    d["mask"][:], d["targets"][:], d["advantages"][:] = True, 5, 1.0
    operands = own(d)
    loss = loss_of(d, operands, objective="reinforce")
    assert loss.item() == pytest.approx(-problems.rows(d, problems.leaves(d))[0].item(), rel=1e-5)
    stepped = [x - 1e-3 * g for x, g in zip(operands, gradients(loss, operands), strict=True)]
    after = rlk.linear_token_logprobs(stepped[0], stepped[1], d["targets"], bias=stepped[2])
    assert after.item() > -loss.item()
