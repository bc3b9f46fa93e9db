"""Objectives of sequences, groups and batches against loops in float64: values, gradients, layouts, dead tokens."""

import math

import pytest
import torch

import rlkernels as rlk
from rlkernels.losses.row_objectives import LOSSES
from rlkernels.losses.row_options import ROW_KINDS

B, L = 6, 7
CU = [0, 5, 7, 14, 15, 15, 20]
LENGTHS = [5, 2, 7, 1, 0, 5]
GROUPS = torch.tensor([4, 4, 9, 9, 2, 2])  # both signs, one sign, one sign beside an empty sequence


def problem(dtype=torch.float64, seed=0):
    """Ratios from 0.2 to 5 in sequences of unlike lengths, one of them empty, with dead tokens inside."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    inside = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    d = {"logp": -1.5 + 0.5 * randn(B, L), "inside": inside}
    d["mask"] = inside & (torch.rand(B, L, generator=draw) < 0.8)
    d["mask"][2, :3] = torch.tensor([True, False, True])
    d["old"], d["ref"] = d["logp"] + 0.6 * randn(B, L), d["logp"] + 0.3 * randn(B, L)
    d["advantages"] = torch.tensor([0.7, -1.3, 0.4, 0.9, 1.0, -0.2]).to(dtype)
    d["rewards"], d["pool"] = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.5]).to(dtype), randn(B, 4).abs()
    return d


def rows(d, logp):
    """``(log-probabilities, old, reference, advantage, place)`` of the live tokens of each sequence."""
    for i in range(B):
        at = d["mask"][i].nonzero()[:, 0]
        yield logp[i][at], d["old"][i][at].double(), d["ref"][i][at].double(), d["advantages"][i].double(), at


def gmpo(d, logp):
    losses = []
    for now, old, _, a, _ in rows(d, logp):
        if len(now):
            gap = now - old
            held = gap.clamp(-0.4, 0.4)
            gap = torch.minimum(gap, held) if a > 0 else torch.maximum(gap, held)
            losses.append(-a * gap.mean().exp())
    return sum(losses) / len(losses)


def token_mean(d, losses):
    return sum(x.sum() for x in losses) / d["mask"].sum()


def vespo(d, logp, weights=None):
    losses = []
    for i, (now, old, _, a, at) in enumerate(rows(d, logp)):
        gap = (now - old).detach().clamp(-20, 20).sum()
        if weights is not None:
            gap = gap + weights[i][at].double().log().clamp(math.log(1e-8), 20).sum()
        gap, (k, scale) = gap.clamp(math.log(1e-8), 20), (2.0, 3.0) if a >= 0 else (3.0, 2.0)
        losses.append(-(scale + k * gap - scale * gap.exp()).exp() * a * now)
    return token_mean(d, losses)


def clipped(now, old, a):
    ratio = (now - old).exp()
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)


def fipo(d, logp, high_only=True, cap=None, safety=4.0):
    losses = []
    for now, old, _, a, at in rows(d, logp):
        gap = (now - old).detach()
        for t in range(len(now)):
            behind = range(t, len(now))
            future = sum(
                2.0 ** (-(at[s] - at[t]).item() / 32.0) * gap[s].item()
                for s in behind
                if cap is None or gap[s].exp() <= cap
            )
            factor = min(max(math.exp(future), 1.0 if high_only else 0.8), 1.2)
            if a < 0 and gap[t].exp() > safety:
                factor = min(max(factor, 0.8), 1.0)
            losses.append(factor * clipped(now[t], old[t], a))
    return token_mean(d, losses)


def real(d, logp):
    losses = []
    for group in GROUPS.unique():
        signs = {True: [], False: []}
        filled = False
        for i, (now, old, _, a, _) in enumerate(rows(d, logp)):
            if GROUPS[i] == group and len(now):
                filled, score = True, (now - old).mean() / 0.5
                signs[bool(a > 0)].append((-score if a > 0 else score).exp())
        if filled:
            both = signs[True] and signs[False]
            losses.append((1 + sum(signs[True])).log() + (1 + sum(signs[False])).log() if both else logp.sum() * 0)
    return sum(losses) / len(losses)


def covariances(d, logp):
    now, a = logp.detach()[d["mask"]], d["advantages"].double()[:, None].expand(B, L)[d["mask"]]
    return (a - a.mean()) * (now - now.mean())


def of_tokens(d, logp):
    a = d["advantages"].double()[:, None].expand(B, L)[d["mask"]]
    return logp[d["mask"]], d["old"].double()[d["mask"]], a


def kl_cov(d, logp):
    now, old, a = of_tokens(d, logp)
    chosen = covariances(d, logp).topk(max(1, int(0.2 * len(now)))).indices
    losses = -(now - old).exp() * a
    return (losses.sum() + 0.5 * (now - old)[chosen].abs().sum()) / len(now)


def clip_cov(d, logp):
    """With a share of 1 every candidate is chosen."""
    now, old, a = of_tokens(d, logp)
    ratio, cov = (now - old).exp(), covariances(d, logp)
    free = ratio.clamp(0.8, 1.2) * a >= ratio * a
    losses = clipped(now, old, a)
    return losses[~((cov > 0.05) & (cov < 0.4) & free)].sum() / len(now)


def a2po(d, logp):
    losses = []
    for i, (now, _, ref, _, _) in enumerate(rows(d, logp)):
        if len(now):
            pool = d["pool"][i].double()
            value = 0.5 * (torch.logsumexp(pool / 0.5, 0) - math.log(4))
            losses.append((0.1 * (now - ref).sum() - (d["rewards"][i].double() - value)) ** 2)
    return sum(losses) / len(losses)


CASES = {
    "gmpo": (gmpo, {}),
    "vespo": (vespo, {}),
    "fipo": (fipo, {}),
    "fipo, both sides": (
        lambda d, x: fipo(d, x, False, 1.5, 1.3),
        {"influence_high_only": False, "ratio_cap": 1.5, "safety_threshold": 1.3},
    ),
    "real": (real, {"group_size": 2}),
    "real of ids": (real, {"group_ids": GROUPS}),
    "kl_cov": (kl_cov, {"kl_cov_ratio": 0.2, "kl_cov_coef": 0.5}),
    "clip_cov": (clip_cov, {"clip_cov_low": 0.05, "clip_cov_high": 0.4, "clip_cov_ratio": 1.0}),
    "a2po": (a2po, {"beta2": 0.1}),
}


def call(name, d, logp, packed=False, **more):
    """``policy_loss`` of a case, padded or without the padding."""
    objective = name.split(",")[0].split(" ")[0]

    def given(x):
        return x[d["inside"]] if packed else x

    options = {**CASES[name][1], **more, **({"cu_seqlens": CU} if packed else {})}
    options = {k: given(x) if isinstance(x, torch.Tensor) and x.shape == (B, L) else x for k, x in options.items()}
    if objective == "a2po":
        options |= {"rewards": d["rewards"], "value_pool": d["pool"], "ref_logprobs": given(d["ref"])}
    advantages = None if objective == "a2po" else d["advantages"]
    return rlk.policy_loss(given(logp), given(d["old"]), advantages, given(d["mask"]), objective=objective, **options)


def test_every_objective_of_the_table_has_a_loss_and_a_case():
    assert set(ROW_KINDS) == set(LOSSES) == {name.split(",")[0].split(" ")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_paper_written_out(name, backend):
    for dtype, unit in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)):
        d = problem(dtype)
        leaf = d["logp"].clone().requires_grad_()
        wide = d["logp"].double().requires_grad_()
        want = CASES[name][0](d, wide)
        (slope,) = torch.autograd.grad(want, wide)
        assert slope.abs().sum() > 0
        for packed in (False, True):
            loss = call(name, d, leaf, packed)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(loss.double(), want, rtol=unit, atol=unit)
            (got,) = torch.autograd.grad(loss, leaf)
            close = unit if dtype != torch.bfloat16 else 8e-3
            torch.testing.assert_close(got.double(), slope, rtol=close, atol=close * slope.abs().max().item())
            assert not got[~d["mask"]].any()


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_what_is_not_detached(name):
    if name.split(",")[0] in ("vespo", "fipo"):
        return  # a detached factor moves under finite differences
    d = problem()
    with rlk.use_backend("eager"):
        leaf = d["logp"].requires_grad_()
        assert torch.autograd.gradcheck(lambda x: call(name, d, x), leaf, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_what_a_dead_token_holds_changes_no_bit(name, value, backend):
    d, dirty = problem(torch.float32), problem(torch.float32)
    for key in ("logp", "old", "ref"):
        dirty[key] = torch.where(d["mask"], d[key], value)
    found = []
    for x in (d, dirty):
        leaf = x["logp"].requires_grad_()
        loss = call(name, x, leaf)
        found.append((loss, torch.autograd.grad(loss, leaf)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", CASES)
def test_without_a_live_token_the_loss_and_its_gradient_are_zero(name):
    d = problem(torch.float32)
    d["mask"] = torch.zeros(B, L, dtype=torch.bool)
    leaf = d["logp"].requires_grad_()
    loss = call(name, d, leaf)
    assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()
    if name != "real":
        loss = rlk.policy_loss(
            torch.zeros(0, 3, requires_grad=True),
            torch.zeros(0, 3),
            None if name == "a2po" else torch.zeros(0),
            objective=name.split(",")[0].split(" ")[0],
            **{k: x[:0] if isinstance(x, torch.Tensor) else x for k, x in CASES[name][1].items()},
            **(
                {"rewards": torch.zeros(0), "value_pool": torch.zeros(0, 4), "ref_logprobs": torch.zeros(0, 3)}
                if name == "a2po"
                else {}
            ),
        )
        loss.backward()
        assert loss == 0


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states_give_the_loss_of_their_log_probabilities(name):
    d, draw = problem(), torch.Generator().manual_seed(1)
    hidden = torch.randn(B, L, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    head = torch.randn(9, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    targets, objective = torch.randint(0, 9, (B, L), generator=draw), name.split(",")[0].split(" ")[0]
    logp = (hidden @ head.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    d["old"], d["ref"] = logp.detach() + d["old"] - d["logp"], logp.detach() + d["ref"] - d["logp"]
    entropy = torch.special.entr((hidden @ head.T).softmax(-1)).sum(-1)
    options = {**CASES[name][1], "kl_coef": 0.2, "entropy_coef": 0.1, "ref_logprobs": d["ref"]}
    state = d["old"], None if objective == "a2po" else d["advantages"], d["mask"]
    if objective == "a2po":
        options |= {"rewards": d["rewards"], "value_pool": d["pool"]}
    want = rlk.policy_loss(logp, *state, objective=objective, entropy=entropy, **options)
    slopes = torch.autograd.grad(want, (hidden, head))
    for function, inputs in (
        (rlk.logits_policy_loss, ((hidden @ head.T), targets)),
        (rlk.linear_policy_loss, (hidden, head, targets)),
    ):
        loss, metrics = function(*inputs, *state, objective=objective, return_metrics=True, **options)
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
        for got, slope in zip(torch.autograd.grad(loss, (hidden, head)), slopes, strict=True):
            torch.testing.assert_close(got, slope, rtol=1e-8, atol=1e-10)
        assert "kl" in metrics and all(x.dim() == 0 for x in metrics.values())


def test_the_set_of_clip_cov_is_drawn_by_the_generator_or_given():
    d = problem()
    options = {"objective": "clip_cov", "clip_cov_low": -9.0, "clip_cov_high": 9.0, "clip_cov_ratio": 0.3}

    def gradient(**more):
        leaf = d["logp"].clone().requires_grad_()
        loss = rlk.policy_loss(leaf, d["old"], d["advantages"], d["mask"], **options, **more)
        return torch.autograd.grad(loss, leaf)[0]

    whole = gradient(clip_cov_tokens=torch.zeros(B, L, dtype=torch.bool))
    drawn = [gradient(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    lost = (whole != 0) & (drawn[0] == 0)
    assert 0 < lost.sum() <= max(1, int(0.3 * d["mask"].sum()))
    assert torch.equal(gradient(clip_cov_tokens=lost), drawn[0])


def test_ranks_of_a_head_draw_no_tokens_by_themselves():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        x, y, w, group = (
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(5, 4),
            distributed.group,
        )
        state = w, y, torch.zeros(2, 3), torch.ones(2, 1)
        options = {"objective": "clip_cov", "process_group": group.WORLD}
        with pytest.raises(ValueError, match="linear_policy_loss: objective 'clip_cov' draws tokens, which every rank"):
            rlk.linear_policy_loss(x, *state, **options)
        loss = rlk.linear_policy_loss(x, *state, generator=torch.Generator(), **options)
        assert loss.isfinite()
    finally:
        distributed.destroy_process_group()


def test_real_stays_finite_where_an_exponential_would_overflow():
    logp = torch.tensor([[-1.0], [-2000.0], [-1.0], [-1.0]], requires_grad=True)
    old = torch.tensor([[-2000.0], [-1.0], [-1.0], [-1.0]])
    loss = rlk.policy_loss(logp, old, torch.tensor([-1.0, 1.0, -1.0, 1.0]), objective="real", group_size=2)
    loss.backward()
    assert loss.item() == pytest.approx((2 * 1999 / 0.5 + 2 * math.log(2)) / 2, rel=1e-6)
    assert logp.grad[:, 0].tolist() == pytest.approx([1.0, -1.0, 0.5, -0.5])


@pytest.mark.parametrize("name", ["gmpo", "a2po", "real"])
def test_rows_and_groups_in_any_order_give_one_loss(name):
    d, order = problem(), torch.tensor([5, 2, 0, 4, 1, 3])
    moved = {k: x[order] for k, x in d.items()}
    more = {"group_size": None, "group_ids": GROUPS} if name == "real" else {}
    want = call(name, d, d["logp"], **more)
    more = {"group_size": None, "group_ids": GROUPS[order]} if name == "real" else {}
    torch.testing.assert_close(call(name, moved, moved["logp"], **more), want)


X = torch.zeros(4, 3)
ONES = torch.ones(4)
BAD = {
    "level": ({"objective": "gmpo", "ratio_level": "sequence"}, ValueError, "decides itself .* ratio_level='sequence'"),
    "option": ({"objective": "gmpo", "tau": 1.0}, TypeError, "takes no 'tau'; it takes clip_low, clip_high"),
    "groups": ({"objective": "real"}, TypeError, "needs one of group_size and group_ids, got neither"),
    "both groups": ({"objective": "real", "group_size": 2, "group_ids": X[:, 0].long()}, TypeError, "got both"),
    "group size": ({"objective": "real", "group_size": 3}, ValueError, "must divide .* got 3 and 4"),
    "group ids twice": (
        {"objective": "real", "group_size": 2, "normalizers": {"group_ids": X[:, 0].long()}},
        ValueError,
        "takes no group_ids here",
    ),
    "share": ({"objective": "kl_cov", "kl_cov_ratio": 1.5}, ValueError, r"kl_cov_ratio must be in \[0, 1\]"),
    "tokens": ({"objective": "clip_cov", "clip_cov_tokens": X}, TypeError, "clip_cov_tokens must be bool"),
    "two choices": (
        {"objective": "clip_cov", "clip_cov_tokens": X.bool(), "generator": torch.Generator()},
        ValueError,
        "pass one of them",
    ),
    "generator": ({"objective": "clip_cov", "generator": 3}, TypeError, "generator must be a torch.Generator or None"),
    "reach": ({"objective": "fipo", "influence_clip": 1.0}, ValueError, r"influence_clip must be in \[0, 1\)"),
    "flag": ({"objective": "fipo", "influence_high_only": 1}, TypeError, "influence_high_only must be True or False"),
    "advantages": (
        {"objective": "a2po", "ref_logprobs": X, "rewards": ONES, "value_pool": X},
        ValueError,
        "pass advantages=None",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_by_name(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=f"^policy_loss: .*{message}"):
        rlk.policy_loss(X, X, ONES, **options)


def test_a2po_names_what_it_misses():
    for options, message in (
        ({}, "needs ref_logprobs"),
        ({"ref_logprobs": X}, "needs 'rewards'"),
        ({"ref_logprobs": X, "rewards": ONES}, "needs 'value_pool'"),
        ({"ref_logprobs": X, "rewards": ONES, "value_pool": X[:3]}, "value_pool has shape"),
        ({"ref_logprobs": X, "rewards": ONES[:2], "value_pool": X}, "rewards has shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            rlk.policy_loss(X, None, None, objective="a2po", **options)
    with pytest.raises(ValueError, match="needs sequences: logprobs"):
        rlk.policy_loss(X[0], X[0], X[0], objective="gmpo")
