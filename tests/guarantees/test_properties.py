"""Properties that hold for every input, over drawn shapes, dtypes, layouts, masks, temperatures; each also held to the
error policy in float64.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import EPS32, LAYOUTS, cotangents, judge, same_bits, statistics
from reference import gae as gae_by_hand

import rlkernels as rlk
from rlkernels.backends import DEVICES, absent, use_backend

PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
# Derandomised: the same examples in every run, so that a failure is found by the change that causes it.
quick = settings(
    derandomize=True, max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
VOCABULARIES = st.one_of(st.integers(1, 70), st.sampled_from([127, 1024, 1025, 4097]))
TEMPERATURES = st.sampled_from([1.0, 0.1, 0.7, 2.0, 50.0])
SEEDS = st.integers(0, 2**31)
BACKEND = st.sampled_from(PRESENT)


@st.composite
def rows(draw, dtype=None, lay_out=True, min_rows=0):
    """Logits of any temperament and layout, int32 or int64 targets with some ignored, a mask, a temperature, a
    reference model.
    """
    dtype = dtype or draw(DTYPES)
    batch, length = (draw(st.integers(min_rows, 3)), draw(st.integers(max(min_rows, 1), 4)))
    vocab, generator = draw(VOCABULARIES), torch.Generator().manual_seed(draw(SEEDS))
    x = torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([0.01, 1.0, 5.0, 20.0])
    )
    x = (x + draw(st.sampled_from([0.0, -1e4, 1e4, 30.0]))).clamp(-3e4, 3e4).to(dtype)
    anchor = draw(st.integers(0, vocab - 1))  # no row is empty
    if draw(st.booleans()):
        kept = (torch.rand(x.shape, generator=generator) < 0.8) | (torch.arange(vocab) == anchor)
        x = torch.where(kept, x, -math.inf)
    if lay_out and batch and length:
        x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    shape = x.shape[:-1]
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    targets = torch.randint(vocab, shape, generator=generator, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    targets = torch.where(torch.rand(shape, generator=generator) < 0.2, ignore_index, targets)
    vocab_mask = None
    kind = draw(st.sampled_from(["none", "per vocabulary", "per row"]))
    if kind != "none":
        vocab_mask = torch.rand((vocab,) if kind == "per vocabulary" else x.shape, generator=generator) < 0.7
        vocab_mask[..., anchor] = True
    temperature = draw(TEMPERATURES)
    if draw(st.booleans()):
        temperature = torch.rand(shape, generator=generator) * 2 + 0.2
    reference = None
    if draw(st.booleans()):
        reference = (x.flip(-1) if draw(st.booleans()) else torch.randn(x.shape, generator=generator)).to(dtype)
        # Finite wherever the policy is: the divergence is finite.
        reference = torch.where(reference.isfinite(), reference, 0.0)
    return (
        x,
        targets,
        {"temperature": temperature, "ignore_index": ignore_index, "vocab_mask": vocab_mask, "ref_logits": reference},
    )


@quick
@given(case=rows(), backend=BACKEND, seed=SEEDS)
def test_statistics_and_gradients_obey_the_error_policy(case, backend, seed):
    x, targets, options = case
    temperature = options.pop("temperature")
    with use_backend(backend):
        judge(rlk.token_stats, x, targets, temperature, **options, seed=seed)


@quick
@given(case=rows(), backend=BACKEND)
def test_logprobs_are_not_positive_and_entropies_lie_between_zero_and_the_log_of_the_support(case, backend):
    x, targets, options = case
    with use_backend(backend):
        stats = rlk.token_stats(
            x,
            targets,
            **options,
            kl=None if options["ref_logits"] is None else "exact",
            outputs=("entropy", "log_sum_sq_probs"),
        )
    support = (
        torch.ones_like(x, dtype=torch.bool) if options["vocab_mask"] is None else options["vocab_mask"].expand(x.shape)
    )
    size = support.sum(-1)
    slack = 8 * EPS32 * (1 + size.float().log())
    assert (stats.logprobs <= 0).all()
    assert (stats.entropy >= -slack).all() and (stats.entropy <= size.float().log() + slack).all()
    # The collision entropy is at most Shannon's and at least 0.
    assert (stats.log_sum_sq_probs <= slack).all() and (-stats.log_sum_sq_probs <= stats.entropy + slack).all()
    if options["ref_logits"] is not None:
        t = options["temperature"]
        widest = (
            torch.where(support & x.isfinite(), options["ref_logits"].float().abs() + x.float().abs(), 0.0).amax(-1) / t
        )
        assert (stats.kl >= -8 * EPS32 * (1 + widest)).all()


@quick
@given(case=rows(lay_out=False, min_rows=1), backend=BACKEND)
def test_the_probabilities_of_all_words_sum_to_one(case, backend):
    x, _, options = case
    vocab = x.shape[-1]
    row, t = x[0, 0], options["temperature"]
    mask = options["vocab_mask"]
    mask = mask if mask is None or mask.dim() == 1 else mask[0, 0]
    with use_backend(backend):
        logp = rlk.token_logprobs(
            row.expand(vocab, vocab),
            torch.arange(vocab),
            vocab_mask=mask,
            temperature=t if isinstance(t, float) else t[0, 0].item(),
        )
    assert logp.double().exp().sum().item() == pytest.approx(1.0, abs=3e-6)


@quick
@given(case=rows(dtype=torch.float32, lay_out=False), backend=BACKEND, seed=SEEDS)
def test_rows_and_columns_may_come_in_any_order(case, backend, seed):
    x, targets, options = case
    generator = torch.Generator().manual_seed(seed)
    vocab, mask, t, ref = x.shape[-1], options["vocab_mask"], options["temperature"], options["ref_logits"]
    columns = torch.randperm(vocab, generator=generator)
    moved = torch.where(
        targets == options["ignore_index"],
        targets,
        columns.argsort()[targets.clamp(0, vocab - 1).long()].to(targets.dtype),
    )
    if options["ignore_index"] >= 0:  # a word may not move onto the ignored number
        moved, columns = targets, torch.arange(vocab)
    with use_backend(backend):
        plain = rlk.token_stats(x, targets, **options)
        shuffled = rlk.token_stats(
            x[..., columns],
            moved,
            **options
            | {
                "vocab_mask": None if mask is None else mask[..., columns],
                "ref_logits": None if ref is None else ref[..., columns],
            },
        )
        for a, b in (
            (plain.logprobs, shuffled.logprobs),
            (plain.entropy, shuffled.entropy),
            (plain.logsumexp, shuffled.logsumexp),
        ):
            torch.testing.assert_close(a, b, rtol=4e-6, atol=1e-5)
        order = torch.randperm(len(x), generator=generator)
        again = rlk.token_stats(
            x[order],
            targets[order],
            **options
            | {
                "vocab_mask": mask if mask is None or mask.dim() == 1 else mask[order],
                "temperature": t if isinstance(t, float) else t[order],
                "ref_logits": None if ref is None else ref[order],
            },
        )
    for a, b in ((plain.logprobs, again.logprobs), (plain.entropy, again.entropy)):
        if backend == "eager":
            torch.testing.assert_close(a[order], b, rtol=4e-6, atol=1e-5)
        else:
            assert same_bits(a[order], b)


@quick
@given(case=rows(lay_out=False, min_rows=1), backend=BACKEND, offset=st.sampled_from([-512.0, 64.0, 1024.0]))
def test_a_common_offset_and_a_divided_temperature_change_nothing(case, backend, offset):
    x, targets, options = case
    options["temperature"] = 2.0
    grid = (x.float().clamp(-30, 30) * 64).round() / 64  # the offset and the division are exact
    grid = torch.where(x == -math.inf, x.float(), grid)
    options["ref_logits"] = None
    with use_backend(backend):
        plain = rlk.token_stats(grid, targets, **options)
        moved = rlk.token_stats(grid + offset, targets, **options)
        divided = rlk.token_stats(grid / 2, targets, **options | {"temperature": 1.0})
    for other in (moved, divided):
        for name in ("logprobs", "entropy"):
            torch.testing.assert_close(getattr(other, name), getattr(plain, name), rtol=2e-6, atol=4e-6)


@quick
@given(case=rows(min_rows=1), backend=BACKEND, scale=st.sampled_from([-2.0, 0.25, 1024.0]), seed=SEEDS)
def test_gradients_are_linear_and_those_of_a_logprob_sum_to_zero(case, backend, scale, seed):
    x, targets, options = case
    x = x.float().detach().requires_grad_()
    options["ref_logits"] = None
    g, h = cotangents(targets.shape, 2, seed)
    with use_backend(backend):
        stats = rlk.token_stats(x, targets, **options)

        def gradient(a, b):
            return torch.autograd.grad((stats.logprobs, stats.entropy), x, (a, b), retain_graph=True)[0]

        base = gradient(g, h)
        torch.testing.assert_close(gradient(scale * g, scale * h), scale * base, rtol=1e-6, atol=1e-30)
        alone = gradient(g, torch.zeros_like(h))
    assert not alone[targets == options["ignore_index"]].any()
    t = options["temperature"]
    mass = alone.double().sum(-1).abs()
    finite = stats.logprobs.isfinite()  # a target at -inf moves g to it, and g p from it
    assert (mass <= 8 * EPS32 * g.abs() / t)[finite].all()
    bound = torch.autograd.grad(stats.entropy, x, h, retain_graph=True)[0].double().sum(-1).abs()
    assert (bound <= 32 * EPS32 * h.abs() / t * (1 + math.log(x.shape[-1]))).all()


@quick
@given(case=rows(min_rows=1), backend=BACKEND, seed=SEEDS)
def test_the_ratio_is_exactly_one_at_the_first_step_and_the_loss_is_minus_the_mean_advantage(case, backend, seed):
    x, targets, options = case
    options.pop("ref_logits")
    if targets.dim() == 0:  # a loss needs a token axis
        return
    (advantages,) = cotangents(targets.shape, 1, seed)
    with use_backend(backend):
        old = rlk.token_logprobs(x, targets, **options)
        live = old.isfinite() & (targets != options["ignore_index"])
        loss, metrics = rlk.logits_policy_loss(
            x, targets, torch.where(live, old, 0.0), advantages, live, return_metrics=True, **options
        )
    assert (
        metrics["ratio"].item() == (1.0 if live.any() else 0.0)
        and metrics["ppo_kl"].item() == 0.0
        and metrics["clip_fraction"].item() == 0.0
    )
    expected = -advantages[live].double().mean().item() if live.any() else 0.0
    assert loss.item() == pytest.approx(expected, rel=2e-6, abs=2e-7)


@quick
@given(case=rows(min_rows=1), backend=BACKEND)
def test_estimators_of_the_divergence_of_a_model_from_itself_are_zero_and_k3_is_never_negative(case, backend):
    x, targets, options = case
    reference = options.pop("ref_logits")
    with use_backend(backend):
        for kl in ("k1", "k2", "k3", "exact"):
            same = rlk.token_stats(x, targets, ref_logits=x, kl=kl, **options)
            finite = same.logprobs.isfinite()
            assert not same.kl[finite].any(), kl
        if reference is not None:
            finite = (
                rlk.token_logprobs(x, targets, **options).isfinite()
                & rlk.token_logprobs(reference, targets, **options).isfinite()
            )
            assert (rlk.token_stats(x, targets, ref_logits=reference, kl="k3", **options).kl[finite] >= 0).all()


@quick
@given(case=rows(min_rows=1), backend=BACKEND)
def test_k3_and_entropy_agree_with_enumeration(case, backend):
    x, _, options = case
    if not isinstance(options["temperature"], float) or x.shape[-1] > 70:
        return
    row, mask = x.reshape(-1, x.shape[-1])[0], options["vocab_mask"]
    mask = mask if mask is None or mask.dim() == 1 else mask.reshape(-1, x.shape[-1])[0]
    vocab = len(row)
    with use_backend(backend):
        logp = rlk.token_logprobs(
            row.expand(vocab, vocab), torch.arange(vocab), vocab_mask=mask, temperature=options["temperature"]
        ).double()
        entropy = rlk.token_stats(
            row[None], torch.tensor([0]), vocab_mask=mask, temperature=options["temperature"], ignore_index=-5
        ).entropy
    expected = -(logp.exp() * torch.where(logp == -math.inf, 0.0, logp)).sum()
    assert entropy.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


@quick
@given(st.integers(0, 3), st.integers(0, 9), SEEDS, BACKEND, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_recurrence_and_with_unit_decay_returns_minus_values(batch, length, seed, backend, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(batch, length, generator=generator, dtype=torch.float64) for _ in range(2))
    with use_backend(backend):
        advantages, returns = rlk.gae(rewards, values, gamma=gamma, lam=lam)
        whole, _ = rlk.gae(rewards, values, gamma=1.0, lam=1.0)
    by_hand = [gae_by_hand(r, v, gamma, lam) for r, v in zip(rewards.tolist(), values.tolist(), strict=True)]
    torch.testing.assert_close(
        advantages, torch.tensor(by_hand, dtype=torch.float64).reshape(batch, length), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(returns, advantages + values, rtol=1e-12, atol=1e-12)
    totals = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(whole, totals - values, rtol=1e-12, atol=1e-12)


@quick
@given(case=rows(min_rows=1), backend=BACKEND, seed=SEEDS, inplace=st.booleans())
def test_the_fused_loss_is_the_loss_of_its_two_passes(case, backend, seed, inplace):
    x, targets, options = case
    options.pop("ref_logits")
    if targets.dim() == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    noise, advantages, weights = (torch.randn(targets.shape, generator=generator) for _ in range(3))
    with use_backend(backend):
        old = rlk.token_logprobs(x, targets, **options)
        live = (
            old.isfinite()
            & (torch.rand(targets.shape, generator=generator) < 0.8)
            & (targets != options["ignore_index"])
        )
        old = torch.where(live, old, 0.0) + 0.3 * noise
        given_weights = {"weights": weights} if x.dim() != 2 or seed % 2 else {}
        leaf = x.detach().requires_grad_()
        non_overlapping = x.is_contiguous()
        source = leaf * 1 if inplace and non_overlapping else leaf
        loss = rlk.logits_policy_loss(
            source,
            targets,
            old,
            advantages,
            live,
            entropy_coef=0.1,
            inplace_backward=inplace and non_overlapping,
            **given_weights,
            **options,
        )
        (fused,) = torch.autograd.grad(loss, leaf, torch.tensor(0.7))
        stats = rlk.token_stats(leaf, targets, **options)
        logp, entropy = stats.logprobs.detach().requires_grad_(), stats.entropy.detach().requires_grad_()
        parts = rlk.policy_loss(logp, old, advantages, live, entropy=entropy, entropy_coef=0.1, **given_weights)
        upstream = torch.autograd.grad(parts, (logp, entropy), torch.tensor(0.7))
        (two,) = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, upstream)
    truth = statistics(x, targets, **options)
    assert loss.item() == pytest.approx(parts.item(), rel=2e-6, abs=1e-6 * (1 + truth["entropy"].max().item()))
    torch.testing.assert_close(fused.double(), two.double(), rtol=1e-5 if x.dtype == torch.float32 else 1e-2, atol=1e-6)
