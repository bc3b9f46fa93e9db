"""What the metrics count as clipped is what the loss clips."""

import pytest
import torch
from loss_batches import batch

import rlkernels as rlk


@pytest.mark.fault(150)
def test_a_value_inside_the_clip_is_not_counted(backend):
    """``old + clamp(v - old)`` rounds away from ``v`` there."""
    value, old, returns = (torch.tensor([[x]]) for x in (0.01436896, -0.24936081, -0.43314537))
    assert abs(value - old) < 0.5 and (old + (value - old).clamp(-0.5, 0.5) - returns) ** 2 > (value - returns) ** 2
    _, metrics = rlk.value_loss(value, old, returns, clip_range=0.5, return_metrics=True)
    assert metrics["clip_fraction"] == 0


@pytest.mark.fault(150)
def test_the_fraction_of_clipped_values_is_that_of_the_truth(backend):
    """100000 tokens, of which some hundred round away: counted in float64 and from the gradient, which is 0 at a
    clipped token alone.
    """
    draw = torch.Generator().manual_seed(0)
    value, old, returns = (torch.randn(4, 25000, generator=draw) for _ in range(3))
    mask = torch.rand(4, 25000, generator=draw) < 0.5
    leaf = value.requires_grad_()
    loss, metrics = rlk.value_loss(leaf, old, returns, mask, clip_range=0.5, return_metrics=True)
    wide, before, R = value.detach().double(), old.double(), returns.double()
    clipped = ((wide - before).abs() > 0.5) & ((before + (wide - before).clamp(-0.5, 0.5) - R) ** 2 > (wide - R) ** 2)
    want = clipped[mask].double().mean().item()
    assert 0.1 < want < 0.9
    assert metrics["clip_fraction"].item() == pytest.approx(want, abs=2.5 / mask.sum().item())
    still = torch.autograd.grad(loss, leaf)[0][mask] == 0
    assert metrics["clip_fraction"].item() == pytest.approx(still.double().mean().item(), rel=1e-6)


@pytest.mark.fault(150)
@pytest.mark.parametrize("function", ["policy_loss", "logits_policy_loss"])
def test_cispo_counts_by_the_ratio_alone(function, backend):
    """Ratios 2, 2, 0.5, 0.5, 1 and bounds of 0.2: four of five weights are clipped, whatever the sign
    of the advantage.
    """
    ratio, A = torch.tensor([[2.0, 2.0, 0.5, 0.5, 1.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    x, y = torch.zeros(1, 5, 2), torch.zeros(1, 5, dtype=torch.long)
    logp = rlk.token_logprobs(x, y)
    first = (logp,) if function == "policy_loss" else (x, y)
    _, metrics = getattr(rlk, function)(
        *first, logp - ratio.log(), A, objective="cispo", clip_low=0.2, clip_high=0.2, return_metrics=True
    )
    found = [metrics[f"clip_fraction{kind}"].item() for kind in ("", "_low", "_high")]
    assert found == pytest.approx([0.8, 0.4, 0.4])


@pytest.mark.fault(150)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip", "cispo", "sapo"])
def test_clip_fractions_are_those_of_the_definition(name, level, backend):
    d = batch(3, (5, 9))
    bounds = {"clip_low": 0.2, "clip_high": 0.3} if name != "sapo" else {}
    more = {"dual_clip": 1.05} if name == "dual_clip" else {}
    A = d["advantages"][:, :1].expand(5, 9)
    _, metrics = rlk.policy_loss(
        d["logp"], d["old"], A, d["mask"], objective=name, ratio_level=level, return_metrics=True, **bounds, **more
    )
    gap = torch.where(d["mask"], (d["logp"] - d["old"]).double(), 0.0)
    if level != "token":
        gap = (gap.sum(-1, keepdim=True) / (1 if level == "sequence_sum" else d["mask"].sum(-1, keepdim=True))).expand(
            5, 9
        )
    ratio, m = gap.exp(), d["mask"]
    if name == "sapo":
        assert not any(key.startswith("clip") for key in metrics)
        return
    low, high = ratio < 0.8, ratio > 1.3
    if name != "cispo":
        low, high = low & (A < 0), high & (A > 0)
    want = {"clip_fraction_low": low, "clip_fraction_high": high, "clip_fraction": low | high}
    if name == "dual_clip":
        want["clip_fraction_dual"] = (ratio > 1.05) & (A < 0)
        assert want["clip_fraction_dual"][m].any()
    assert {key for key in metrics if key.startswith("clip")} == set(want)
    for key, x in want.items():
        assert metrics[key].item() == pytest.approx(x[m].double().mean().item(), rel=1e-6), key


WAYS = ("policy_loss", "logits_policy_loss", "linear_policy_loss")
COUNTED = {
    "factors of 0": {"correction": "factors"},
    "a mask of the rollout": {"correction": {"mode": "mask", "low": 0.8, "high": 1.2}, "rollout_logprobs": "rollout"},
    "weights of 0": {"weights": "weights"},
    "both": {"correction": "factors", "weights": "weights"},
    "both, with a KL": {"correction": "factors", "weights": "weights", "ref_logprobs": "old", "kl_coef": 0.1},
    "factors at a sequence level": {"correction": "factors", "ratio_level": "sequence"},
    "weights at a sequence level": {"weights": "weights", "ratio_level": "sequence"},
    "a KL term for the metric alone": {"ref_logprobs": "old", "kl": "term"},
    "a KL term with weights": {"ref_logprobs": "old", "kl": "weighing term", "kl_coef": 0.1},
    "a normaliser of 0": {"aggregation": "token-mean", "normalizers": {"batch_num_tokens": 0}},
    "a normaliser of 0 for some": {
        "aggregation": "prompt-mean",
        "normalizers": {"group_ids": torch.tensor([0, 1, 2]), "group_tokens": torch.tensor([0, 4, 7])},
    },
    "a KL term whose normaliser is 0": {"ref_logprobs": "old", "kl": "uncounted term", "kl_coef": 0.1},
    "an exact KL": {"ref_hidden": "ref_hidden", "kl": "reverse_kl", "kl_coef": 0.1, "weights": "weights"},
}


UNCOUNTED = {"a normaliser of 0": slice(None), "a normaliser of 0 for some": 0}
"""Rows to which the normaliser gives no weight."""


@pytest.mark.parametrize("bounded", [False, True], ids=["", "bounded"])
@pytest.mark.parametrize("what", COUNTED)
def test_the_metrics_count_the_tokens_with_a_weight_in_every_form(what, bounded):
    draw = torch.Generator().manual_seed(5)
    shape = 3, 6

    def normal(*sizes):
        return torch.randn(*sizes, generator=draw, dtype=torch.float64)

    hidden, weight, targets = normal(*shape, 4), normal(9, 4), torch.randint(9, shape, generator=draw)
    mask, own = (torch.rand(shape, generator=draw) < 0.7 for _ in range(2))
    mask[:, 0] = True
    logits = hidden @ weight.T
    logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    zeros = torch.tensor([[0, 1, 0, 1, 1, 0]] * 3).double()
    data = {
        "factors": zeros,
        "weights": zeros.flip(-1) / 7,
        "old": logp + 0.3 * normal(*shape),
        "rollout": logp + 0.3 * normal(*shape),
        "term": rlk.KLTerm("k2", mask=own),
        "uncounted term": rlk.KLTerm("k2", mask=own, normalizers={"batch_num_tokens": 0}),
        "weighing term": rlk.KLTerm("k2", mask=own, weights=zeros),
        "ref_hidden": hidden.flip(0),
    }
    options = {k: data.get(x, x) if isinstance(x, str) else x for k, x in COUNTED[what].items()}
    if "ratio_level" in options:
        data["old"] = logp + 0.1 * normal(*shape)
    counted = mask & (data["weights"] != 0) if "weights" in options else mask.clone()
    if what in UNCOUNTED:
        counted[UNCOUNTED[what]] = False
    found, advantages = {}, normal(*shape)
    for way in WAYS:
        given = {"logits_policy_loss": (logits, targets), "linear_policy_loss": (hidden, weight, targets)}.get(
            way, (logp,)
        )
        more = {}
        if "ref_hidden" in options and way != "linear_policy_loss":
            if way == "policy_loss":
                continue
            more = {"ref_logits": options["ref_hidden"] @ weight.T, "ref_hidden": None}
        elif "ref_hidden" in options:
            more = {"ref_weight": weight}
        if bounded and way == "linear_policy_loss":
            more["max_live_tokens"] = 18
        if way == "policy_loss":
            more["entropy"] = -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)
        call = {k: x for k, x in {**options, **more}.items() if x is not None}
        _, found[way] = getattr(rlk, way)(*given, data["old"], advantages, mask, return_metrics=True, **call)
    gap = data["old"] - logp

    def mean(x, tokens=counted):
        return x[tokens].sum() / max(tokens.sum(), 1)

    true = {"ppo_kl": mean(gap), "approx_kl": mean(0.5 * gap.square())}
    if "ratio_level" not in options:
        true["ratio"] = mean((-gap).exp())
        true["ratio_max"] = (-gap)[counted].exp().max() if counted.any() else torch.zeros((), dtype=torch.float64)
    of_term = {
        "a KL term for the metric alone": own,
        "a KL term with weights": own & (zeros != 0),
        "a KL term whose normaliser is 0": own & False,
    }
    if what in of_term:
        true["kl"] = mean(0.5 * gap.square(), of_term[what])
    for way, metrics in found.items():
        for name, x in true.items():
            torch.testing.assert_close(
                metrics[name], x, rtol=1e-9, atol=1e-12, msg=lambda m, n=name, way=way: f"{way} {n}: {m}"
            )
    first = found["logits_policy_loss"]
    for way, metrics in found.items():
        assert metrics.keys() == first.keys(), way
        for name, x in first.items():
            torch.testing.assert_close(
                metrics[name], x, rtol=1e-9, atol=1e-12, msg=lambda m, n=name, way=way: f"{way} {n}: {m}"
            )


def test_a_gate_is_counted_behind_the_clamp_of_the_log_ratio():
    new, old, advantages = torch.tensor([[0.5, 1.5, 3.0]]), torch.zeros(1, 3), torch.ones(1, 3)
    options = {"objective": "rollout_is", "rollout_logprobs": old, "clip_low": 0.5, "clip_high": 3.0}
    for clamp, left_out in ((None, 2 / 3), (1.0, 0.0), (2.0, 2 / 3)):
        _, metrics = rlk.policy_loss(new, old, advantages, log_ratio_clamp=clamp, return_metrics=True, **options)
        torch.testing.assert_close(metrics["clip_fraction"], torch.tensor(left_out))


@pytest.mark.parametrize("way", WAYS[1:])
def test_metrics_beside_normalizers_read_no_row_again(way, monkeypatch):
    def read(*_, **__):
        raise AssertionError("rows were read for the metrics alone")

    monkeypatch.setattr(rlk.losses.logits_policy.ops, "token_stats", read)
    monkeypatch.setattr(rlk.linear.policy_loss, "head_stats", read)
    hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(9, 4), torch.zeros(2, 3, dtype=torch.int64)
    given = (hidden @ weight.T, targets) if way == "logits_policy_loss" else (hidden, weight, targets)
    zeros = torch.zeros(2, 3)
    number = {"batch_num_tokens": torch.tensor(6)}
    _, metrics = getattr(rlk, way)(*given, zeros, zeros, normalizers=number, return_metrics=True)
    assert metrics["ratio"] > 0
