"""More cases of a head over a process group: vocabulary masks, and divergences from a second head."""

import re

import torch
from reference import statistics
from vocab_parallel_cases import case
from vocab_parallel_worker import WIDTH, L, Problem, assert_gradients, assert_near

import rlkernels as rlk

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def masked(p, per_token, seed=3):
    """A mask of the whole vocabulary: one token's target lies outside, and one shard has no column in one row."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand((*p.shape, p.vocab) if per_token else (p.vocab,), generator=draw) < 0.6
    if per_token:
        mask[0, 3] = False
        mask[0, 3, 100:] = True
        p.targets[0, 3] = 110
        p.targets[2, 4] = int((~mask[2, 4]).nonzero()[0])
    else:
        p.targets[2, 4] = int((~mask).nonzero()[-1])
    return mask


def masked_truth(p, mask, wide):
    logits = p.logits(*wide)
    logits = torch.where(mask, logits, -torch.inf)
    truth = statistics(logits, p.targets, p.settings.get("temperature", 1.0), dtype=torch.float64)
    scaled = torch.where(mask, p.logits(*wide), 0.0).sum(-1) / mask.sum(-1) / p.settings["temperature"]
    truth["mean_logits"] = torch.where(p.targets == -100, 0.0, scaled)
    return truth


@case(
    "a vocabulary mask per {rows} over {layout} shards gives the statistics of the dense head in {dtype}",
    rows=("batch", "token"),
    layout=("padded", "uneven"),
    dtype=(torch.float32, torch.float64),
)
def statistics_of_a_mask(me, rows, layout, dtype):
    p = Problem(dtype)
    mask = masked(p, rows == "token")
    shard, wide, (g, e) = p.shard(me, layout), p.leaves(), p.cotangents
    truth = masked_truth(p, mask, wide)
    leaf, options = p.arguments(shard)
    stats = rlk.linear_token_stats(
        leaf, shard.weight, p.targets, outputs=OUTPUTS, vocab_mask=mask, chunk_tokens=5, **options
    )
    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    assert stats.logprobs[2, 4] == -torch.inf
    for name in ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(
            getattr(stats, name).double(), truth[name].double(), **close, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert torch.equal(stats.is_top1, truth["is_top1"])
    # The derivative of -inf is no number, so that the dense head makes nothing of such a target either.
    inside = truth["logprobs"].isfinite()
    live = p.targets != -100
    loss = torch.where(inside, stats.logprobs * g, 0.0).sum() + (stats.entropy * e).sum() + 0.5 * stats.logsumexp.sum()
    true = torch.where(inside, truth["logprobs"] * g, 0.0).sum() + (truth["entropy"] * e).sum()
    true = true + 0.5 * torch.where(live, truth["logsumexp"], 0.0).sum()
    got = torch.autograd.grad(loss, (leaf, shard.weight, shard.bias), retain_graph=True)
    assert_gradients(got, torch.autograd.grad(true, wide), shard, rows, factor=4)
    whole = p.leaves(dtype)
    dense = rlk.linear_token_logprobs(whole[0], whole[1], p.targets, bias=whole[2], vocab_mask=mask, **p.settings)
    expected = torch.autograd.grad(dense, whole, torch.ones_like(dense))
    got = torch.autograd.grad(stats.logprobs, (leaf, shard.weight, shard.bias), torch.ones_like(dense))
    assert_gradients(got, [x.double() for x in expected], shard, f"a target outside, {rows}", factor=4)
    return {"logprobs": stats.logprobs, "entropy": stats.entropy, "hidden": got[0]}


@case("a loss with a vocabulary mask is that of the dense head, with ratios per {level}", level=("token", "sequence"))
def loss_of_a_mask(me, level):
    p = Problem(torch.float64, seed=1)
    mask = masked(p, True)
    mask.scatter_(-1, p.targets.clamp(min=0)[..., None], True)  # no log-probability is -inf
    shard, whole = p.shard(me, "uneven"), p.leaves()
    leaf, options = p.arguments(shard)
    more = {"ref_logprobs": p.ref, "kl_coef": 0.1, "entropy_coef": 0.02, "ratio_level": level, "vocab_mask": mask}
    columns = p.targets, p.old, p.advantages, p.mask
    loss = rlk.linear_policy_loss(leaf, shard.weight, *columns, chunk_tokens=8, **more, **options)
    dense = rlk.linear_policy_loss(whole[0], whole[1], *columns, bias=whole[2], **more, **p.settings)
    torch.testing.assert_close(loss, dense, rtol=1e-11, atol=0)
    got = torch.autograd.grad(loss, (leaf, shard.weight, shard.bias))
    assert_gradients(got, torch.autograd.grad(dense, whole), shard, level, factor=4)
    return {"loss": loss, "hidden": got[0]}


@case("a vocabulary mask of another size, or another one on a rank, is refused on every rank")
def wrong_masks(me):
    p = Problem()
    shard = p.shard(me, "uneven")
    leaf, options = p.arguments(shard)
    for mask, kind, message in (
        (torch.ones(p.vocab + 1, dtype=torch.bool), ValueError, r"vocab_mask has shape \(134,\), expected \(133,\) or"),
        (torch.arange(p.vocab) != me.rank, RuntimeError, "the ranks of process_group differ.*digest of vocab_mask"),
        (
            (torch.arange(p.vocab) != me.rank).expand(*p.shape, -1),
            RuntimeError,
            "the ranks of process_group differ.*digest of vocab_mask",
        ),
    ):
        try:
            rlk.linear_token_logprobs(leaf, shard.weight, p.targets, vocab_mask=mask, **options)
        except kind as error:
            assert re.search(message, str(error)), str(error)
        else:
            raise AssertionError(f"no error; expected {message}")


def second_head(p, me, layout, draw):
    """A teacher's hidden states and head, whole and cut like the student's."""
    hidden = torch.randn(*p.shape, 5, generator=draw, dtype=torch.float64).to(p.dtype)
    q = Problem(p.dtype, p.vocab)
    q.weight = torch.randn(p.vocab, 5, generator=draw, dtype=torch.float64).to(p.dtype)
    q.bias = torch.randn(p.vocab, generator=draw, dtype=torch.float64).to(p.dtype)
    shard = q.shard(me, layout)
    return hidden, q.weight, q.bias, shard.weight.detach(), shard.bias.detach()


def true_divergence(kind, student, teacher):
    p, q = (x.log_softmax(-1) for x in (student, teacher))

    def kl(a, b):
        return torch.where(a == -torch.inf, 0.0, a.exp() * (a - b)).sum(-1)

    if kind == "cross_entropy":
        return -torch.where(q == -torch.inf, 0.0, q.exp() * p).sum(-1)
    if kind != "jsd":
        return kl(q, p) if kind == "forward_kl" else kl(p, q)
    m = torch.logaddexp(p + torch.tensor(0.3).double().log(), q + torch.tensor(0.7).double().log())
    return 0.7 * kl(q, m) + 0.3 * kl(p, m)


@case(
    "a {kind} from a second head in {dtype} is that of the dense heads, each token by itself too",
    kind=("forward_kl", "reverse_kl", "jsd", "cross_entropy"),
    dtype=(torch.float64, torch.bfloat16),
)
def divergences(me, kind, dtype):
    p, draw = Problem(dtype, seed=2), torch.Generator().manual_seed(9)
    layout = "padded" if kind in ("forward_kl", "jsd") else "uneven"
    hidden, weight, bias, *mine = second_head(p, me, layout, draw)
    shard, wide = p.shard(me, layout), p.leaves()
    scale, cap = p.settings["logit_scale"], p.settings["softcap"]
    teacher = cap * torch.tanh((hidden.double() @ weight.double().t() + bias.double()) * scale / cap)
    heat = p.temperature.double()[..., None]
    each = true_divergence(kind, p.logits(*wide) / heat, teacher / heat)
    leaf, options = p.arguments(shard)
    more = {"kind": kind, "teacher_softcap": cap, "teacher_logit_scale": scale, "teacher_bias": mine[1]}
    if kind == "jsd":
        more["beta"] = 0.7
    arguments = leaf, shard.weight, hidden, mine[0], p.mask
    loss, metrics = rlk.linear_distillation_loss(*arguments, chunk_tokens=4, return_metrics=True, **more, **options)
    true = each[p.mask].mean()
    close = {"rtol": 1e-11 if p.real == torch.float64 else 2e-5, "atol": 1e-12}
    torch.testing.assert_close(loss.double(), true, **close)
    torch.testing.assert_close(metrics["divergence"], loss, rtol=1e-5, atol=1e-7)
    got = torch.autograd.grad(loss, (leaf, shard.weight, shard.bias))
    assert_gradients(got, torch.autograd.grad(true, wide, retain_graph=True), shard, kind, factor=10, flat=True)
    apart = rlk.linear_distillation_loss(*arguments, chunk_tokens=16, reduction="none", **more, **options)
    torch.testing.assert_close(
        apart.double(),
        torch.where(p.mask, each, 0.0).detach(),
        **{**close, "atol": 2e-5 if p.real != torch.float64 else 1e-12},
    )
    upstream = torch.where(p.mask, p.cotangents[1].double(), 0.0)
    got = torch.autograd.grad(apart, (leaf, shard.weight, shard.bias), p.cotangents[1])
    assert_gradients(got, torch.autograd.grad(each, wide, upstream), shard, f"{kind} of tokens", factor=10, flat=True)
    return {"loss": loss, "each": apart, "hidden": got[0]}


@case(
    "an exact {kind} beside a policy loss is that of the dense heads, {masked} a mask",
    kind=("reverse_kl", "forward_kl"),
    masked=("with", "without"),
)
def exact_kl(me, kind, masked):
    p, draw = Problem(torch.float64, seed=4), torch.Generator().manual_seed(8)
    hidden, weight, bias, *mine = second_head(p, me, "uneven", draw)
    shard, wide = p.shard(me, "uneven"), p.leaves()
    mask = torch.rand(p.vocab, generator=draw) < (0.7 if masked == "with" else 2.0)
    mask[40:101] = masked == "without"  # of four shards one or two have no column
    mask[p.targets[p.targets >= 0]] = True
    logits = torch.where(mask, p.logits(*wide), -torch.inf)
    scale, cap = p.settings["logit_scale"], p.settings["softcap"]
    teacher = cap * torch.tanh((hidden @ weight.t() + bias) * scale / cap)
    heat = p.temperature[..., None]
    each = true_divergence(kind, (p.logits(*wide) / heat)[..., mask], (teacher / heat)[..., mask])
    logp = statistics(logits, p.targets, p.temperature, dtype=torch.float64)["logprobs"]
    live = p.mask & (p.targets != -100)
    ratio = (logp - p.old).exp()
    surrogate = -torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages)
    true = torch.where(live, surrogate + 0.3 * each, 0.0).sum() / live.sum()
    leaf, options = p.arguments(shard)
    loss, metrics = rlk.linear_policy_loss(
        leaf,
        shard.weight,
        p.targets,
        p.old,
        p.advantages,
        p.mask,
        ref_hidden=hidden,
        ref_weight=mine[0],
        ref_bias=mine[1],
        kl=kind if masked == "with" else rlk.KLTerm(kind),
        kl_coef=0.3,
        vocab_mask=mask if masked == "with" else None,
        return_metrics=True,
        **options,
    )
    torch.testing.assert_close(loss, true, rtol=1e-11, atol=0)
    torch.testing.assert_close(metrics["kl"], each[live].mean(), rtol=1e-11, atol=0)
    got = torch.autograd.grad(loss, (leaf, shard.weight, shard.bias))
    assert_gradients(got, torch.autograd.grad(true, wide), shard, kind, factor=10)
    return {"loss": loss, "hidden": got[0], "kl": metrics["kl"]}


@case("ASFT of a sharded head is that of the dense heads")
def asft(me):
    p, draw = Problem(torch.float64, seed=4), torch.Generator().manual_seed(8)
    hidden, weight, bias, *mine = second_head(p, me, "uneven", draw)
    shard, whole = p.shard(me, "uneven"), p.leaves()
    leaf, options = p.arguments(shard)
    more = {"kind": "asft", "asft_alpha": 0.3, "ref_hidden": hidden}
    found = rlk.linear_sft_loss(
        leaf, shard.weight, p.targets, p.mask, ref_weight=mine[0], ref_bias=mine[1], chunk_tokens=8, **more, **options
    )
    dense = rlk.linear_sft_loss(
        *whole[:2], p.targets, p.mask, bias=whole[2], ref_weight=weight, ref_bias=bias, **more, **p.settings
    )
    torch.testing.assert_close(found, dense, rtol=1e-11, atol=0)
    got = torch.autograd.grad(found, (leaf, shard.weight, shard.bias))
    assert_gradients(got, torch.autograd.grad(dense, whole), shard, "asft", factor=4)
    return {"loss": found}


@case("heads that are cut unlike are refused on every rank")
def unlike_heads(me):
    h, weight = torch.zeros(4, WIDTH), torch.zeros(10, WIDTH)
    message = "both heads are cut alike; weight has columns"
    try:
        rlk.linear_distillation_loss(h, weight, h, torch.zeros(11, WIDTH), process_group=me.group)
    except ValueError as error:
        assert re.search(f"^linear_distillation_loss: .*{message}", str(error)), str(error)
    else:
        raise AssertionError(f"no error; expected {message}")
    other = torch.full((4, WIDTH), float(me.rank))
    try:
        rlk.linear_distillation_loss(h, weight, other, weight, process_group=me.group)
    except RuntimeError as error:
        assert "sum of hidden states of the teacher" in str(error), str(error)
    else:
        raise AssertionError("ranks with different teachers went through")


@case("a shard without a column of the vocabulary takes no part in a divergence")
def no_column_of_a_divergence(me):
    p, draw = Problem(torch.float64, vocab=5), torch.Generator().manual_seed(9)
    p.settings = {}
    hidden, weight, bias, *mine = second_head(p, me, 8, draw)
    shard, wide = p.shard(me, 8), p.leaves()
    leaf, options = p.arguments(shard)
    each = rlk.linear_distillation_loss(
        leaf, shard.weight, hidden, mine[0], p.mask, teacher_bias=mine[1], reduction="none", **options
    )
    true = torch.where(p.mask, true_divergence("forward_kl", p.logits(*wide), hidden @ weight.t() + bias), 0.0)
    torch.testing.assert_close(each, true, rtol=1e-11, atol=1e-12)
    (got,), (want,) = torch.autograd.grad(each.sum(), leaf), torch.autograd.grad(true.sum(), wide[0])
    assert_near(got, want, "hidden", factor=4)
    assert each.shape == (3, L)
