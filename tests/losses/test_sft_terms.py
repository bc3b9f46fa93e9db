"""z-loss, label smoothing, EAFT and weighted means against torch in float64; RFT, a PTX mix and a step of ReFT as sums
of public calls.
"""

import math

import pytest
import torch

import rlkernels as rlk

B, L, V = 3, 6, 41


def problem(dtype=torch.float64):
    """Logits, targets of which some are ignored, and a mask whose first row is dead; garbage in the dead rows."""
    draw = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(B, L, V, generator=draw, dtype=torch.float64)).to(dtype)
    targets, mask = torch.randint(V, (B, L), generator=draw), torch.rand(B, L, generator=draw) < 0.7
    mask[0], mask[1:, 0] = False, True
    targets[1, 2] = -100
    live = mask & (targets != -100)
    logits[~live] = torch.nan
    targets[0, 0] = V + 7
    return logits, targets, mask, live


def truth(logits, targets, live, vocab_mask=None, kind="nll", z=0.0, e=0.0, alpha=1.0, v=1.0, temperature=0.7):
    """Loss and gradient in float64; ``v``: a factor per token."""
    leaf = logits.double().requires_grad_()
    rows = torch.where(live[..., None], leaf, 0.0) / temperature
    kept = torch.ones(V, dtype=torch.bool) if vocab_mask is None else vocab_mask
    rows = rows.masked_fill(~kept, -torch.inf)
    logp = torch.log_softmax(rows, -1)
    nll = -logp.gather(-1, torch.where(live, targets, int(kept.byte().argmax()))[..., None])[..., 0]
    uniform = -torch.where(kept, logp, 0.0).sum(-1) / kept.sum()
    losses = (1 - e) * nll + e * uniform
    if kind == "dft":
        losses = (-nll).exp().detach() * nll
    if kind == "eaft":
        top = torch.softmax(rows.detach().topk(20).values, -1)
        losses = ((-top * top.log()).sum(-1) / 3) ** alpha * nll
    total = v * losses + z * abs(v) * rows.logsumexp(-1) ** 2
    loss = torch.where(live, total, 0.0).sum() / live.sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0].nan_to_num(0.0)


CASES = {
    "z": {"z": 0.3},
    "smoothed": {"e": 0.2},
    "smoothed with z": {"z": 0.3, "e": 1.0},
    "dft with z": {"kind": "dft", "z": 0.1},
    "eaft": {"kind": "eaft"},
    "eaft with z": {"kind": "eaft", "z": 0.1, "alpha": 0.5},
}


@pytest.mark.parametrize("columns", (False, True))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_term_has_the_loss_and_the_gradient_of_its_formula(case, dtype, columns, backend):
    logits, targets, mask, live = problem(dtype)
    options = CASES[case]
    keep = torch.arange(V) % 5 != 3 if columns else None
    if columns:
        targets = torch.where(targets % 5 == 3, 0, targets)
    want, slope = truth(logits, targets, live, keep, **options)
    given = {name: options[key] for name, key in (("z_loss_coef", "z"), ("label_smoothing", "e")) if key in options}
    given |= {"eaft_alpha": options["alpha"]} if "alpha" in options else {}
    leaf = logits.requires_grad_()
    kind = options.get("kind", "nll")
    loss, metrics = rlk.sft_loss(
        leaf, targets, mask, kind=kind, temperature=0.7, vocab_mask=keep, return_metrics=True, **given
    )
    loss.backward()
    rtol, atol = {torch.float64: (1e-11, 1e-13), torch.float32: (2e-5, 1e-6), torch.bfloat16: (1e-2, 1e-3)}[dtype]
    torch.testing.assert_close(loss.detach().double(), want, rtol=min(rtol, 2e-5), atol=atol)
    torch.testing.assert_close(leaf.grad.double(), slope, rtol=rtol, atol=atol)
    assert not leaf.grad[~live].any() and ("z_loss" in metrics) == ("z" in options)
    without = rlk.sft_loss(leaf, targets, mask, kind=kind, temperature=0.7, vocab_mask=keep, **given)
    torch.testing.assert_close(without, loss, rtol=1e-6, atol=0)


def test_label_smoothing_is_that_of_cross_entropy():
    logits, targets = problem(torch.float32)[0].nan_to_num(0.0), problem()[1].clamp(max=V - 1)
    want = torch.nn.functional.cross_entropy(logits.view(-1, V), targets.view(-1), label_smoothing=0.1)
    torch.testing.assert_close(rlk.sft_loss(logits, targets, label_smoothing=0.1), want)


def test_packed_is_padded_and_nothing_alive_is_0():
    logits, targets, mask, _ = problem()
    options = {"z_loss_coef": 0.1, "label_smoothing": 0.1, "aggregation": "seq-mean-token-mean"}
    padded = rlk.sft_loss(logits, targets, mask, **options)
    flat = logits.flatten(0, 1), targets.flatten(), mask.flatten()
    packed = rlk.sft_loss(*flat, cu_seqlens=[0, L, 2 * L, 3 * L], **options)
    torch.testing.assert_close(packed, padded)
    eaft = [rlk.sft_loss(*x, kind="eaft", inplace_backward=False) for x in ((logits, targets, mask), flat)]
    torch.testing.assert_close(*eaft)
    for kind, more in (("nll", {"z_loss_coef": 0.1}), ("eaft", {})):
        leaf = logits.clone().requires_grad_()
        loss = rlk.sft_loss(leaf, targets, torch.zeros_like(mask), kind=kind, **more)
        loss.backward()
        assert loss == 0 and not leaf.grad.any()


def test_weights_of_either_sign_and_of_0_scale_every_term():
    logits, targets, mask, live = problem()
    v = torch.randn(B, L, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    v[1, 1] = 0.0
    want, slope = truth(logits, targets, live, z=0.2, e=0.1, v=v)
    leaf = logits.requires_grad_()
    loss = rlk.sft_loss(leaf, targets, mask, sample_weights=v, z_loss_coef=0.2, label_smoothing=0.1, temperature=0.7)
    loss.backward()
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(leaf.grad, slope)
    assert not leaf.grad[1, 1].any()


@pytest.mark.parametrize("shape", ("row", "token"))
def test_the_denominator_counts_all_tokens_unless_the_weights_normalise(shape):
    logits, targets, mask, live = problem()
    v = torch.rand((B,) if shape == "row" else (B, L), dtype=torch.float64) + 0.1
    spread = v[:, None].expand(B, L) if shape == "row" else v
    logp = torch.where(live, rlk.token_logprobs(logits, torch.where(live, targets, -100)), 0.0)
    plain = rlk.logprobs_sft_loss(logp, live, sample_weights=v)
    torch.testing.assert_close(plain, -(spread * logp)[live].sum() / live.sum())
    normalized = -(spread * logp)[live].sum() / spread[live].sum()
    for loss in (
        rlk.logprobs_sft_loss(logp, live, sample_weights=v, normalize_by_weight=True),
        rlk.sft_loss(logits, targets, mask, sample_weights=v, normalize_by_weight=True),
    ):
        torch.testing.assert_close(loss, normalized)
    assert rlk.logprobs_sft_loss(logp, live, sample_weights=torch.zeros_like(v), normalize_by_weight=True) == 0


def test_rejection_sampling_trains_on_the_best_responses_alone():
    logits, targets, mask, live = problem()
    rewards, groups = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([4, 4, 9])
    chosen = rlk.best_of_n(rewards, groups)
    assert chosen.tolist() == [False, True, True]
    leaf = logits.requires_grad_()
    loss = rlk.sft_loss(leaf, targets, mask, sample_weights=(chosen & (rewards > 0)).double())
    loss.backward()
    logp = rlk.token_logprobs(logits.detach(), torch.where(live, targets, -100))
    torch.testing.assert_close(loss.detach(), -logp[1][live[1]].sum() / live.sum())
    assert leaf.grad[1].any() and not leaf.grad[[0, 2]].any()


def test_a_ptx_mix_is_a_policy_loss_and_a_weighted_likelihood():
    logits, targets, mask, live = problem()
    text, tokens = torch.randn(2, 4, V, dtype=torch.float64), torch.randint(V, (2, 4))
    old, advantages, leaf = torch.full((B, L), -3.0, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0]), text.clone()
    leaf.requires_grad_()
    policy = rlk.logits_policy_loss(logits, targets, old, advantages.double()[:, None].expand(B, L), mask)
    (policy + 27.8 * rlk.sft_loss(leaf, tokens)).backward()
    want = torch.func.grad(lambda x: 27.8 * torch.nn.functional.cross_entropy(x.view(-1, V), tokens.view(-1)))(text)
    torch.testing.assert_close(leaf.grad, want)


def test_a_step_of_reft_is_gae_whitening_the_clipped_policy_and_the_value_loss():
    draw = torch.Generator().manual_seed(5)
    logp, old, ref, values = (torch.randn(2, 4, generator=draw, dtype=torch.float64) - 2 for _ in range(4))
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    ends, score = torch.tensor([2, 3]), torch.tensor([1.0, 0.1], dtype=torch.float64)
    rewards = -0.05 * (old - ref)
    rewards[torch.arange(2), ends] += score
    advantages, returns = rlk.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    leaf, heads = logp.clone().requires_grad_(), values.clone().requires_grad_()
    loss = rlk.policy_loss(
        leaf,
        old,
        rlk.masked_whiten(advantages, mask),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        aggregation="seq-mean-token-mean",
    ) + 5.0 * rlk.value_loss(heads, values, returns, mask, clip_range=0.2, aggregation="seq-mean-token-mean")
    total = torch.zeros((), dtype=torch.float64)
    found = []
    for b in range(2):
        n, last, row = int(mask[b].sum()), 0.0, []
        for t in reversed(range(n)):
            delta = rewards[b, t] + (values[b, t + 1] if t + 1 < n else 0.0) - values[b, t]
            last = delta + 0.95 * last
            row.insert(0, last)
        found.append(torch.stack(row))
    flat = torch.cat(found)
    for b in range(2):
        n = len(found[b])
        a = (found[b] - flat.mean()) / (flat.std() + 1e-8)
        r = (logp - old)[b, :n].exp()
        policy = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a).mean()
        total = total + (policy + 5.0 * 0.5 * (found[b] ** 2).mean()) / 2
    torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("kind", ("nll", "dft"))
def test_the_z_loss_of_a_head_is_that_of_its_logits(kind, dtype):
    _, targets, mask, live = problem()
    draw = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*x, generator=draw, dtype=torch.float64).to(dtype) for x in ((B, L, 5), (V, 5)))
    hidden[~live] = torch.nan
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    options = {"kind": kind, "z_loss_coef": 0.2, "sample_weights": torch.tensor([1.0, -2.0, 0.5])}
    loss, metrics = rlk.linear_sft_loss(*leaves, targets, mask, chunk_tokens=4, return_metrics=True, **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    logits = torch.where(live[..., None], wide[0], 0.0) @ wide[1].T
    want, of_logits = rlk.sft_loss(logits, targets, mask, return_metrics=True, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(metrics["z_loss"].double(), of_logits["z_loss"], rtol=1e-5, atol=1e-7)
    slopes = torch.autograd.grad(want, wide)
    for got, slope in zip(torch.autograd.grad(loss, leaves), slopes, strict=True):
        torch.testing.assert_close(got.double(), slope.nan_to_num(0.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", ({}, {"z_loss_coef": 0.1}), ids=str)
def test_the_metrics_count_a_token_of_which_the_model_is_sure(more):
    # The factor of EAFT is 0 in the first row, whose support has one column.
    logits, targets = torch.tensor([[0.0, 5.0], [0.0, 0.0]]), torch.tensor([0, 1])
    support = torch.tensor([[True, False], [True, True]])
    options = {"kind": "eaft", "vocab_mask": support, "return_metrics": True, **more}
    _, metrics = rlk.sft_loss(logits, targets, **options)
    for name, want in (("nll", math.log(2) / 2), ("probability", 0.75), ("entropy", math.log(2) / 2)):
        torch.testing.assert_close(metrics[name], torch.tensor(want))


def test_numbers_out_of_range_and_unread_options_are_refused():
    logits, targets = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)
    for wrong, words in (
        ({"z_loss_coef": -1.0}, "z_loss_coef must not be negative"),
        ({"z_loss_coef": math.nan}, "z_loss_coef"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "kind": "dft"}, "label_smoothing goes with kind 'nll'"),
        ({"eaft_alpha": 1.0}, "eaft_alpha goes with kind 'eaft'"),
        ({"eaft_alpha": -1.0, "kind": "eaft"}, "eaft_alpha must not be negative"),
        ({"normalize_by_weight": True}, "normalize_by_weight"),
    ):
        with pytest.raises(ValueError, match=f"sft_loss: {words}"):
            rlk.sft_loss(logits, targets, **wrong)
    with pytest.raises(ValueError, match="kind"):
        rlk.logprobs_sft_loss(torch.zeros(1, 2), kind="eaft")
