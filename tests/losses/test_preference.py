"""Paired preference losses: every type against its formula in float64, extremes, parts of a batch, weights, mixtures,
metrics, refusals.
"""

import math

import preference_oracles as oracle
import pytest
import torch

import rlkernels as rlk
from rlkernels.backends import DEVICES, absent, use_backend
from rlkernels.losses.preference import pair_losses, preference_options
from rlkernels.losses.preference_types import KINDS

PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
DTYPES = (torch.float64, torch.float32)
BETA, SMOOTHING = 0.4, 0.1


def batch(pairs=7, dtype=torch.float64, seed=0):
    """Log-probabilities of whole answers, and their lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (2, pairs), generator=draw)
    policy = -lengths * (0.2 + torch.rand(2, pairs, generator=draw, dtype=torch.float64))
    reference = policy + torch.randn(2, pairs, generator=draw, dtype=torch.float64)
    return *(x.to(dtype) for x in (*policy, *reference)), *lengths


def options_for(name, n, m, **more):
    options = {"loss_type": name, "beta": BETA, "chosen_lengths": n, "rejected_lengths": m, **more}
    options |= oracle.further((name,), len(n))
    if name in oracle.SMOOTHED:
        options["label_smoothing"] = SMOOTHING
    return options


def expected(name, C, R, f, g, n, m, divergence="reverse_kl", averaged=False, beta=BETA):
    """The losses of the pairs by the formula, in the dtype of the arguments."""
    e = SMOOTHING if name in oracle.SMOOTHED else 0.0
    if name in oracle.OF_MARGIN or name in oracle.AVERAGED:
        c, r = (oracle.SCORES[divergence](x) for x in (C - f, R - g))
        if averaged or name in oracle.AVERAGED:
            c, r = c / n, r / m
        return oracle.OF_MARGIN[oracle.AVERAGED.get(name, name)](c - r, beta, e)
    if averaged:
        C, R, f, g = C / n, R / m, f / n, g / m
    if name in oracle.OF_RATIOS:
        return oracle.OF_RATIOS[name](C - f, R - g, beta)
    if name in ("aot", "aot_unpaired"):
        return getattr(oracle, name)(C, R, f, g, beta, e)
    likelihood = -C * len(C) / n.sum()  # its mean over pairs is the mean over tokens
    if name == "sft":
        return likelihood
    return oracle.OF_POLICY[name](C, R, n, m, beta, e) + (likelihood if name.startswith("cpo") else 0.0)


def check(got, want, dtype, what):
    rtol, atol = (1e-11, 1e-12) if dtype == torch.float64 else (2e-5, 2e-6)
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def with_gradients(function, C, R, cotangent):
    leaves = [x.detach().clone().requires_grad_() for x in (C, R)]
    losses = function(*leaves)
    gradients = torch.autograd.grad((losses * cotangent.to(losses.dtype)).sum(), leaves, allow_unused=True)
    return losses.detach(), [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, gradients, strict=True)]


VARIANTS = [(name, "reverse_kl", False) for name in KINDS]
VARIANTS += [
    (name, divergence, averaged)
    for name in oracle.OF_MARGIN
    for divergence in oracle.SCORES
    for averaged in (False, True)
]
VARIANTS += [(name, "reverse_kl", True) for name in (*oracle.OF_RATIOS, "aot", "aot_unpaired", "tpo", "tpo_ipo")]


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name,divergence,averaged", dict.fromkeys(VARIANTS))
def test_loss_of_each_pair_and_its_gradient_are_those_of_the_formula(name, divergence, averaged, dtype, backend):
    C, R, f, g, n, m = batch(dtype=dtype)
    given = options_for(name, n, m, f_divergence=divergence, length_normalized=averaged)
    cotangent = torch.linspace(-1, 2, len(C), dtype=torch.float64)
    wide = [x.double() for x in (f, g, n, m)]
    want, slopes = with_gradients(
        lambda c, r: expected(name, c, r, *wide, divergence, averaged), C.double(), R.double(), cotangent
    )
    references = (f, g) if KINDS[name].reference else (None, None)
    with use_backend(backend):
        options = preference_options("test", C, **given)
        losses, gradients = with_gradients(
            lambda c, r: pair_losses("test", c, r, *references, options), C, R, cotangent
        )
        mean, shares = with_gradients(lambda c, r: rlk.dpo_loss(c, r, *references, **given), C, R, torch.tensor(3.0))
    check(losses, want, dtype, "losses")
    check(mean, want.mean(), dtype, "mean")
    _, averages = with_gradients(
        lambda c, r: expected(name, c, r, *wide, divergence, averaged).mean(), C.double(), R.double(), torch.tensor(3.0)
    )
    for got, slope, share, average in zip(gradients, slopes, shares, averages, strict=True):
        check(got, slope, dtype, "gradient of the losses")
        check(share, average, dtype, "gradient of the mean")
        assert got.dtype == dtype


@pytest.mark.fault(24, 25)
@pytest.mark.parametrize(
    "name,divergence",
    [
        (name, divergence)
        for name, kind in KINDS.items()
        if kind.reference
        for divergence in oracle.SCORES
        if divergence == "reverse_kl" or "f_divergence" in kind.takes
    ],
)
def test_extreme_margins_give_finite_losses_and_no_nan_gradient(name, divergence):
    places = torch.tensor([20.0, 88.0, 200.0, 1e4])
    gaps = torch.cat([places, -places])
    C, R = (x.reshape(-1).clone() for x in torch.meshgrid(gaps, gaps, indexing="ij"))
    zero, n = torch.zeros_like(C), torch.ones_like(C)
    given = options_for(name, n, n, f_divergence=divergence, beta=0.1)
    options = preference_options("test", C, **given)
    losses, gradients = with_gradients(
        lambda c, r: pair_losses("test", c, r, zero, zero, options), C, R, torch.ones(len(C))
    )
    # e^80, where a divergence is capped, is below the largest float32; its square, which IPO takes, is not.
    squared = divergence in ("forward_kl", "alpha_divergence") and name in ("ipo", "ipo_norm")
    assert squared or losses.isfinite().all()
    assert not losses.isnan().any() and not any(d.isnan().any() for d in gradients)
    if divergence == "reverse_kl":
        wide = [x.double() for x in (zero, zero, n, n)]
        want, slopes = with_gradients(
            lambda c, r: expected(name, c, r, *wide, beta=0.1), C.double(), R.double(), torch.ones(len(C))
        )
        # DiscoPOP's formula is inf * 0 in float64 as well.
        sound = want.isfinite() & torch.stack(slopes).isfinite().all(0)
        assert sound.sum() >= len(C) // 4
        check(losses[sound], want[sound], torch.float32, "losses")
        for got, slope in zip(gradients, slopes, strict=True):
            torch.testing.assert_close(got[sound].double(), slope[sound], rtol=2e-5, atol=1e-7)


@pytest.mark.fault(79)
@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orpo_keeps_its_digits_up_to_a_certain_answer(dtype, backend):
    means = torch.tensor([-1e-8, -1e-4, -0.69, -0.7, -5.0, -50.0], dtype=dtype)
    C, R = (x.reshape(-1).clone() for x in torch.meshgrid(means, means, indexing="ij"))
    one = torch.ones_like(C)
    want, slopes = with_gradients(
        lambda c, r: oracle.OF_POLICY["orpo"](c, r, one.double(), one.double(), 0.1, 0.0), C.double(), R.double(), one
    )
    with use_backend(backend):
        options = preference_options("test", C, loss_type="orpo", chosen_lengths=one, rejected_lengths=one)
        losses, gradients = with_gradients(lambda c, r: pair_losses("test", c, r, None, None, options), C, R, one)
    check(losses, want, dtype, "losses")
    for got, slope in zip(gradients, slopes, strict=True):
        check(got, slope, dtype, "gradient")


@pytest.mark.fault(79)
def test_at_probability_one_the_odds_are_infinite_and_give_no_gradient():
    C, R = torch.tensor([0.0, -1.0]), torch.tensor([-1.0, 0.0])
    options = preference_options(
        "test", C, loss_type="orpo_odds_ratio", chosen_lengths=torch.ones(2), rejected_lengths=torch.ones(2)
    )
    losses, (dchosen, drejected) = with_gradients(
        lambda c, r: pair_losses("test", c, r, None, None, options), C, R, torch.ones(2)
    )
    assert losses.tolist() == [0.0, math.inf]
    assert dchosen[0] == 0 and drejected[1] == 0 and dchosen.isfinite().all() and drejected.isfinite().all()


@pytest.mark.parametrize("alpha", [0.3, -0.3])
@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_alphapo_transforms_the_log_probabilities(name, alpha):
    C, R, _, _, n, m = batch()
    lengths = (n, m) if name == "simpo" else (torch.ones_like(n), torch.ones_like(m))
    given = options_for(name, n, m, alphapo_alpha=alpha, cpo_alpha=0.0)

    def formula(c, r):
        scores = [(1 - x.exp().pow(-alpha)) / alpha for x in (c / lengths[0], r / lengths[1])]
        return oracle.smoothed(BETA * (scores[0] - scores[1]) - (0.5 if name == "simpo" else 0.0), SMOOTHING)

    options = preference_options("test", C, **given)
    want, slopes = with_gradients(formula, C, R, torch.ones(len(C)))
    losses, gradients = with_gradients(
        lambda c, r: pair_losses("test", c, r, None, None, options), C, R, torch.ones(len(C))
    )
    check(losses, want, torch.float64, "losses")
    for got, slope in zip(gradients, slopes, strict=True):
        check(got, slope, torch.float64, "gradient")


def test_the_likelihood_of_cpo_is_a_mean_over_the_tokens_of_all_chosen_answers():
    C, R, _, _, n, m = batch()
    bare = rlk.dpo_loss(C, R, loss_type="cpo", cpo_alpha=0.0)
    for coefficient, given in ((1.0, {}), (0.25, {"cpo_alpha": 0.25})):
        loss = rlk.dpo_loss(C, R, loss_type="cpo", chosen_lengths=n, **given)
        torch.testing.assert_close(loss, bare - coefficient * C.sum() / n.sum(), rtol=1e-12, atol=0)
    simpo = rlk.dpo_loss(C, R, loss_type="simpo", chosen_lengths=n, rejected_lengths=m)
    with_it = rlk.dpo_loss(C, R, loss_type="simpo", chosen_lengths=n, rejected_lengths=m, cpo_alpha=2.0)
    torch.testing.assert_close(with_it, simpo - 2.0 * C.sum() / n.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].separable])
def test_parts_of_a_batch_give_the_bits_of_the_whole_batch(name):
    C, R, f, g, n, m = batch(pairs=9, dtype=torch.float32)
    options = preference_options("test", C, **options_for(name, n, m), pair_weights=torch.linspace(0.0, 2.0, 9))
    assert options.separable()
    references = (f, g) if KINDS[name].reference else (None, None)
    whole, slopes = with_gradients(lambda c, r: pair_losses("test", c, r, *references, options), C, R, torch.ones(9))
    parts, gradients = [], []
    for start, end in ((0, 2), (2, 3), (3, 9)):
        cut = [None if x is None else x[start:end] for x in references]
        part = options.part(start, end)
        losses, slope = with_gradients(
            lambda c, r, cut=cut, part=part: pair_losses("test", c, r, *cut, part),
            C[start:end],
            R[start:end],
            torch.ones(end - start),
        )
        parts.append(losses)
        gradients.append(torch.stack(slope))
    assert torch.equal(torch.cat(parts), whole) and torch.equal(torch.cat(gradients, 1), torch.stack(slopes))


def test_only_the_losses_that_sort_are_not_separable():
    assert {name for name, kind in KINDS.items() if not kind.separable} == {"aot", "aot_unpaired"}
    assert not preference_options("test", torch.zeros(3), loss_type=("sigmoid", "aot")).separable()
    C, R, f, g, *_ = batch(pairs=8)
    options = preference_options("test", C, loss_type="aot")
    halves = [pair_losses("test", C[s], R[s], f[s], g[s], options) for s in (slice(0, 4), slice(4, 8))]
    assert not torch.allclose(torch.cat(halves), pair_losses("test", C, R, f, g, options))


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].separable])
def test_a_pair_of_weight_0_is_left_out_whatever_it_holds(name):
    C, R, f, g, n, m = batch(dtype=torch.float32)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 1.0, 0.25])
    references = (f, g) if KINDS[name].reference else (None, None)
    given = {**options_for(name, n, m), "pair_weights": weights}
    loss, slopes = with_gradients(lambda c, r: rlk.dpo_loss(c, r, *references, **given), C, R, torch.tensor(1.0))
    wide = [x.double() for x in (f, g, n, m)]
    want, truth = with_gradients(
        lambda c, r: (weights.double() * expected(name, c, r, *wide)).mean(), C.double(), R.double(), torch.tensor(1.0)
    )
    check(loss, want, torch.float32, "loss")
    C[1], R[4] = math.nan, math.inf
    dirty, gradients = with_gradients(lambda c, r: rlk.dpo_loss(c, r, *references, **given), C, R, torch.tensor(1.0))
    assert torch.equal(dirty, loss)
    for got, clean, slope in zip(gradients, slopes, truth, strict=True):
        check(got, slope, torch.float32, "gradient")
        assert torch.equal(got, clean) and (got[weights == 0] == 0).all()


def test_a_mixture_is_the_weighted_sum_of_its_losses():
    C, R, f, g, n, m = batch()
    names, shares = ("sigmoid", "bco_pair", "sft", "exo_pair"), (0.8, 0.2, 1.0, -0.5)
    loss = rlk.dpo_loss(C, R, f, g, **options_for(names[0], n, m) | {"loss_type": names}, loss_weights=shares)
    want = sum(share * expected(name, C, R, f, g, n, m).mean() for name, share in zip(names, shares, strict=True))
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    twice = rlk.dpo_loss(C, R, f, g, loss_type=("sigmoid", "sigmoid"))
    torch.testing.assert_close(twice, 2 * rlk.dpo_loss(C, R, f, g), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_no_pair_gives_0_that_is_attached_to_the_graph(name):
    none = torch.zeros(0, requires_grad=True)
    given = options_for(name, none.detach(), none.detach())
    loss, metrics = rlk.dpo_loss(
        none, none * 1.0, *(() if not KINDS[name].reference else (none.detach(),) * 2), **given, return_metrics=True
    )
    assert loss.item() == 0 and loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, none)
    assert gradient.shape == (0,) and all(value == 0 for value in metrics.values())
