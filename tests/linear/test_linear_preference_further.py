"""LD-DPO, three answers, losses per pair, a beta per pair and the sums of each answer, from hidden states; and KTO over
averages.
"""

import pytest
import torch

import rlkernels as rlk

P, L, H, V = 3, 5, 4, 11


def batch(packed=False):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2 * P, L, H), (V, H)))
    targets, mask = torch.randint(V, (2 * P, L), generator=draw), torch.rand(2 * P, L, generator=draw) < 0.7
    mask[:, 0] = True
    hidden[~mask] = torch.nan
    refs = -5 * torch.rand(2, P, generator=draw, dtype=torch.float64)
    d = {"ref_chosen_logps": refs[0], "ref_rejected_logps": refs[1]}
    if packed:
        hidden, targets, mask = hidden.flatten(0, 1), targets.flatten(), mask.flatten()
        d["cu_seqlens"] = torch.arange(2 * P + 1) * L
    return hidden.requires_grad_(), weight.requires_grad_(), targets, mask, d


def sums_of(hidden, weight, targets, mask, ld_alpha=1.0):
    logp = torch.log_softmax(torch.where(mask[..., None], hidden, 0.0) @ weight.T, -1)
    logp = logp.gather(-1, targets[..., None])[..., 0].view(2 * P, L)
    mask = mask.view(2 * P, L)
    weights = torch.cat(rlk.length_desensitized_weights(mask[:P], mask[P:], ld_alpha)).double()
    return (torch.where(mask, logp, 0.0) * weights).sum(-1), mask.sum(-1)


@torch.no_grad()
def of_tokens(hidden, weight, targets, mask):
    logits = (torch.where(mask[..., None], hidden, 0.0) @ weight.T).view(2 * P, L, V)
    mask, targets = mask.view(2 * P, L), targets.view(2 * P, L)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    right = (logits.argmax(-1) == targets).double()
    return {
        "logits_chosen": logits[:P].mean(-1)[mask[:P]].mean(),
        "logits_rejected": logits[P:].mean(-1)[mask[P:]].mean(),
        "entropy": entropy[mask].mean(),
        "token_accuracy": right[:P][mask[:P]].mean(),
    }


def same(got, want, leaves):
    torch.testing.assert_close(got, want)
    found, truth = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (got, want))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0))


CASES = {
    "LD-DPO": {"ld_alpha": 0.3},
    "LD-DPO of a sorted batch": {"ld_alpha": 0.3, "loss_type": "aot"},
    "a beta per pair": {"beta": torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)},
    "a sum": {"reduction": "sum"},
    "a sum of a sorted batch": {"reduction": "sum", "loss_type": "aot"},
    "each pair": {"reduction": "none", "ld_alpha": 0.5},
    "a part": {"loss_type": ("ipo_norm", "sft"), "num_pairs": 9, "num_chosen_tokens": 40.0},
}


@pytest.mark.parametrize("chunk", ({}, {"chunk_tokens": 4}))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_sums(case, packed, chunk):
    hidden, weight, targets, mask, d = batch(packed)
    options = dict(CASES[case])
    loss, metrics = rlk.linear_dpo_loss(hidden, weight, targets, mask, **d, **options, **chunk, return_metrics=True)
    sums, n = sums_of(hidden, weight, targets, mask, options.pop("ld_alpha", 1.0))
    refs = d["ref_chosen_logps"], d["ref_rejected_logps"]
    lengths = {"chosen_lengths": n[:P], "rejected_lengths": n[P:]}
    want, of_sums = rlk.dpo_loss(sums[:P], sums[P:], *refs, **lengths, **options, return_metrics=True)
    same(loss, want, (hidden, weight))
    torch.testing.assert_close(metrics.pop("chosen_logps"), sums[:P].detach())
    torch.testing.assert_close(metrics.pop("rejected_logps"), sums[P:].detach())
    for name, x in of_tokens(hidden, weight, targets, mask).items():
        torch.testing.assert_close(metrics.pop(name), x)
    torch.testing.assert_close(metrics, of_sums)


@pytest.mark.parametrize("names", ("tpo", ("tpo_l", "aot")))
def test_the_gold_answers_get_their_gradient_beside_the_head(names):
    hidden, weight, targets, mask, d = batch()
    gold = -5 * torch.rand(P, dtype=torch.float64)
    gold.requires_grad_()
    options = {"loss_type": names, "gold_lengths": torch.tensor([3, 1, 4]), "tpo_alpha": 0.7}
    loss = rlk.linear_dpo_loss(hidden, weight, targets, mask, **d, **options, gold_logps=gold)
    sums, n = sums_of(hidden, weight, targets, mask)
    refs = d["ref_chosen_logps"], d["ref_rejected_logps"]
    lengths = {"chosen_lengths": n[:P], "rejected_lengths": n[P:]}
    same(loss, rlk.dpo_loss(sums[:P], sums[P:], *refs, **lengths, **options, gold_logps=gold), (hidden, weight, gold))


@pytest.mark.parametrize("name", ("kto", "bco", "kto_paired_batch"))
def test_answers_without_pairs_may_be_averaged(name):
    hidden, weight, targets, mask, d = batch()
    refs, good = torch.cat([d["ref_chosen_logps"], d["ref_rejected_logps"]]), torch.arange(2 * P) < P
    options = {"kto": {"kl": 0.1}, "bco": {"delta": 0.1}}.get(name, {}) | {"loss_type": name, "beta": 2.0}
    sums, n = sums_of(hidden, weight, targets, mask)
    rho = (sums - refs) / n
    if name == "kto":
        each = 1 - torch.sigmoid(2.0 * torch.where(good, rho - 0.1, 0.1 - rho))
    elif name == "bco":
        each = -torch.nn.functional.logsigmoid(torch.where(good, 2.0 * rho - 0.1, 0.1 - 2.0 * rho))
    else:
        up, down = (rho[x].mean().clamp(min=0) for x in (good, ~good))
        each = 1 - torch.sigmoid(2.0 * torch.where(good, rho - down, up - rho))
    direct, metrics = rlk.unpaired_preference_loss(
        sums, refs, good, length_normalized=True, lengths=n, return_metrics=True, **options
    )
    same(direct, each.mean(), (hidden, weight))
    torch.testing.assert_close(metrics["reward_margin"], 2.0 * (rho[good].mean() - rho[~good].mean()).detach())
    for chunk in ({}, {"chunk_tokens": 6}):
        loss = rlk.linear_unpaired_preference_loss(
            hidden, weight, targets, refs, good, mask, length_normalized=True, **options, **chunk
        )
        same(loss, direct, (hidden, weight))


def test_lengths_that_nobody_looks_at_are_refused():
    x, good = torch.zeros(2), torch.tensor([True, False])
    for options, words in (
        ({"length_normalized": True}, "length_normalized needs lengths"),
        ({"lengths": torch.ones(2)}, "lengths are looked at with length_normalized=True alone"),
        ({"kl_group": object()}, "kl_group averages kl_logps"),
    ):
        with pytest.raises(ValueError, match=f"^unpaired_preference_loss: {words}"):
            rlk.unpaired_preference_loss(x, x, good, kl=0.0, **options)
    assert rlk.unpaired_preference_loss(x, x, good, kl=0.0, beta=0.0) == 0.5


def test_the_accuracy_of_tokens_has_the_digits_of_the_other_metrics():
    hidden, weight = torch.ones(2, 3, 1, dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    targets = torch.tensor([[0, 1, 1], [0, 0, 0]])
    options = {"reference_free": True, "reduction": "none", "return_metrics": True}
    _, metrics = rlk.linear_dpo_loss(hidden, weight, targets, **options)
    assert metrics["token_accuracy"].item() == 1 / 3
