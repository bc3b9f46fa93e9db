"""Calls of every public function on one set of data, with its gradients; rows and the fused policy run for their
results and gradient.

Every tensor argument of every public function occurs in some call. Those of TRAINED come as leaves that require a
gradient. ``arguments`` sees each tensor argument on its way into a function, and may put another in its place.
"""

import functools
import inspect
import threading
from contextlib import contextmanager

import advantage_calls
import divergence_calls
import kl_calls
import masked_head_calls
import packing_calls
import preference_calls
import reward_calls
import rollout_calls
import torch
from reference import draw_rows
from row_runs import ALL

import rlkernels

B, L, V, H = 3, 5, 37, 8
_within = threading.local()


@contextmanager
def arguments(change):
    """Inside, ``change(function, argument, tensor)`` gives what the function gets instead; an argument in a dict is
    called by its key there.
    """
    before, _within.change = getattr(_within, "change", None), change
    try:
        yield
    finally:
        _within.change = before


class _Through:
    """The library, its functions called with changed arguments inside of ``arguments``."""

    def __getattr__(self, name):
        function, change = getattr(rlkernels, name), getattr(_within, "change", None)
        return (
            function
            if change is None
            else functools.partial(_changed, name, function, inspect.signature(function), change)
        )


def _changed(name, function, signature, change, *args, **kwargs):
    def of(argument, x):
        if isinstance(x, torch.Tensor):
            return change(name, argument, x)
        return {key: of(key, value) for key, value in x.items()} if isinstance(x, dict) else x

    bound = signature.bind(*args, **kwargs)
    bound.arguments = {argument: of(argument, x) for argument, x in bound.arguments.items()}
    return function(*bound.args, **bound.kwargs)


rlk = _Through()


def data(seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits, targets, vocab_mask = draw_rows((B, L), V, seed=seed)
    per_token = {
        name: torch.randn(B, L, generator=draw)
        for name in ("logprobs", "old", "ref", "advantages", "values", "old_values", "returns", "rewards")
    }
    mask, columns = torch.rand(B, L, generator=draw) < 0.8, torch.arange(V) % 3 > 0
    columns[targets.clamp(min=0).view(-1)] = True
    mask[:, 0] = True
    return {
        **per_token,
        "columns": columns,
        "logits": logits,
        "targets": targets,
        "vocab_mask": vocab_mask,
        "ref_logits": logits.flip(-1).clone(),
        "mask": mask,
        "temperature": torch.rand(B, L, generator=draw) + 0.5,
        "entropy": torch.rand(B, L, generator=draw),
        "cu": torch.tensor([0, 4, 9, 15]),
        "rows_of_five": torch.tensor([0, 5, 10, 15]),
        "there": torch.ones(B, L, dtype=torch.bool),
        "hidden": torch.randn(B, L, H, generator=draw),
        "weight": torch.randn(V, H, generator=draw),
        "bias": torch.randn(V, generator=draw),
        "head": torch.randn(1, H, generator=draw),
        "pair_a": torch.randn(6, generator=draw),
        "pair_b": torch.randn(6, generator=draw),
        "pair_c": torch.randn(6, generator=draw),
        "pair_d": torch.randn(6, generator=draw),
        "groups": torch.tensor([4, 1, 4, 1, 4, 4]),
        "lengths": torch.tensor([3, 1, 2, 5, 4, 2]),
        "answers": torch.tensor([0, 3, 8, 11, 15]),
        "token_weights": torch.rand(B, L, generator=draw),
        "per_row": torch.randn(B, generator=draw),
        "rows": torch.tensor([7, 2, 7]),
        "count": torch.tensor(11.0),
        "number": torch.tensor(0.3),
        "spans": torch.tensor([[0, 4], [9, 15]]),
        **reward_calls.data((B, L), draw),
        **divergence_calls.data((B, L), V, H, draw),
        **advantage_calls.data((B, L), draw),
    }


TRAINED = (
    "logits",
    "logprobs",
    "entropy",
    "values",
    "hidden",
    "weight",
    "bias",
    "head",
    "pair_a",
    "pair_b",
    "span_scores",
)
CALLS = {
    "token_logprobs": lambda d: rlk.token_logprobs(
        d["logits"], d["targets"], temperature=d["temperature"], vocab_mask=d["vocab_mask"]
    ),
    "token_stats": lambda d: rlk.token_stats(
        d["logits"],
        d["targets"],
        temperature=d["temperature"],
        vocab_mask=d["vocab_mask"],
        ref_logits=d["ref_logits"],
        kl="exact",
        outputs=ALL,
    ),
    "linear_token_logprobs": lambda d: rlk.linear_token_logprobs(
        d["hidden"],
        d["weight"],
        d["targets"],
        bias=d["bias"],
        temperature=d["temperature"],
        softcap=5.0,
        chunk_tokens=4,
    ),
    "linear_token_stats": lambda d: rlk.linear_token_stats(
        d["hidden"], d["weight"], d["targets"], bias=d["bias"], temperature=d["temperature"]
    ),
    "linear_policy_loss": lambda d: rlk.linear_policy_loss(
        d["hidden"],
        d["weight"],
        d["targets"],
        d["old"],
        d["advantages"],
        d["mask"],
        bias=d["bias"],
        temperature=d["temperature"],
        softcap=5.0,
        logit_scale=0.9,
        chunk_tokens=4,
        weights=d["token_weights"],
        ref_logprobs=d["ref"],
        kl_coef=0.1,
        entropy_coef=0.1,
        return_metrics=True,
    ),
    "linear_policy_loss of sequences": lambda d: rlk.linear_policy_loss(
        d["hidden"],
        d["weight"],
        d["targets"],
        d["old"],
        d["advantages"],
        d["mask"],
        bias=d["bias"],
        chunk_tokens=4,
        ratio_level="sequence",
        aggregation="seq-mean-token-mean",
        return_metrics=True,
    ),
    "linear_sft_loss": lambda d: rlk.linear_sft_loss(
        d["hidden"],
        d["weight"],
        d["targets"],
        d["mask"],
        bias=d["bias"],
        chunk_tokens=4,
        kind="dft",
        temperature=d["temperature"],
        sample_weights=d["advantages"],
        return_metrics=True,
    ),
    "linear_dpo_loss": lambda d: rlk.linear_dpo_loss(
        d["hidden"].view(-1, H),
        d["weight"],
        d["targets"].view(-1),
        d["mask"].view(-1),
        bias=d["bias"],
        cu_seqlens=d["answers"],
        chunk_tokens=4,
        ref_chosen_logps=d["pair_c"][:2],
        ref_rejected_logps=d["pair_d"][:2],
        pair_weights=d["token_weights"].view(-1)[:2],
        return_metrics=True,
    ),
    "linear_unpaired_preference_loss": lambda d: rlk.linear_unpaired_preference_loss(
        d["hidden"],
        d["weight"],
        d["targets"],
        d["pair_c"][:3],
        d["groups"][:3] == 4,
        d["mask"],
        bias=d["bias"],
        chunk_tokens=4,
        kl_logps=d["pair_a"].detach(),
        ref_kl_logps=d["pair_d"],
        return_metrics=True,
    ),
    "policy_loss": lambda d: rlk.policy_loss(
        d["logprobs"],
        d["old"],
        d["advantages"],
        d["mask"],
        ref_logprobs=d["ref"],
        kl_coef=0.1,
        entropy=d["entropy"],
        entropy_coef=0.1,
        return_metrics=True,
    ),
    "policy_loss of sequences": lambda d: rlk.policy_loss(
        d["logprobs"], d["old"], d["advantages"], d["mask"], ratio_level="sequence"
    ),
    "logits_policy_loss": lambda d: rlk.logits_policy_loss(
        d["logits"],
        d["targets"],
        d["old"],
        d["advantages"],
        d["mask"],
        temperature=d["temperature"],
        vocab_mask=d["vocab_mask"],
        ref_logprobs=d["ref"],
        kl_coef=0.1,
        entropy_coef=0.1,
        weights=d["token_weights"],
        return_metrics=True,
    ),
    "logits_policy_loss of sequences": lambda d: rlk.logits_policy_loss(
        d["logits"],
        d["targets"],
        d["old"],
        d["advantages"],
        d["mask"],
        ratio_level="sequence_token",
        aggregation="seq-mean-token-mean",
    ),
    "value_loss": lambda d: rlk.value_loss(
        d["values"], d["old_values"], d["returns"], d["mask"], clip_range=0.2, return_metrics=True
    ),
    "dpo_loss": lambda d: rlk.dpo_loss(
        d["pair_a"], d["pair_b"], d["pair_c"], d["pair_d"], label_smoothing=0.1, return_metrics=True
    ),
    "dpo_loss of a mixture": lambda d: rlk.dpo_loss(
        d["pair_a"],
        d["pair_b"],
        d["pair_c"],
        d["pair_d"],
        loss_type=("exo_pair", "sft"),
        loss_weights=(1.0, 0.5),
        label_smoothing=0.1,
        f_divergence="js_divergence",
        length_normalized=True,
        chosen_lengths=d["lengths"],
        rejected_lengths=d["lengths"],
        pair_weights=d["token_weights"].view(-1)[:6],
        return_metrics=True,
    ),
    "dpo_loss without a reference": lambda d: rlk.dpo_loss(
        -d["pair_a"].exp(),
        -d["pair_b"].exp(),
        loss_type=("orpo", "cpo"),
        alphapo_alpha=0.2,
        chosen_lengths=d["lengths"],
        rejected_lengths=d["lengths"],
        return_metrics=True,
    ),
    "unpaired_preference_loss": lambda d: rlk.unpaired_preference_loss(
        d["pair_a"], d["pair_c"], d["groups"] == 4, kl_logps=d["pair_d"], ref_kl_logps=d["pair_c"], return_metrics=True
    ),
    "length_desensitized_weights": lambda d: rlk.length_desensitized_weights(d["mask"], d["mask"].flip(0), 0.5),
    "sft_loss": lambda d: rlk.sft_loss(
        d["logits"],
        d["targets"],
        d["mask"],
        kind="dft",
        temperature=d["temperature"],
        vocab_mask=d["vocab_mask"],
        sample_weights=d["advantages"],
        return_metrics=True,
    ),
    "logprobs_sft_loss": lambda d: rlk.logprobs_sft_loss(
        d["logprobs"], d["mask"], kind="dft", sample_weights=d["advantages"][:, 0], return_metrics=True
    ),
    **preference_calls.calls(rlk),
    **reward_calls.calls(rlk),
    **kl_calls.calls(rlk),
    **advantage_calls.calls(rlk),
    "gae": lambda d: rlk.gae(d["rewards"], d["values"], d["mask"], lam=0.9),
    "discounted_returns": lambda d: rlk.discounted_returns(
        d["rewards"].view(-1), d["mask"].view(-1), gamma=0.9, cu_seqlens=d["cu"]
    ),
    "masked_whiten": lambda d: rlk.masked_whiten(d["values"], d["mask"]),
    "masked_whiten of a part": lambda d: rlk.masked_whiten(
        d["values"], d["mask"], moments=rlkernels.masked_moments(d["old"])
    ),
    "masked_moments": lambda d: rlk.masked_moments(d["old"], d["mask"], dim=1),
    "merge_moments": lambda d: rlk.merge_moments(
        [rlkernels.Moments(2, 0.5, 3.0), rlkernels.masked_moments(d["old"], d["mask"])]
    ),
    "group_advantages": lambda d: rlk.group_advantages(d["pair_c"], d["groups"]),
    "token_weights": lambda d: rlk.token_weights(d["mask"].view(-1), "seq-mean-token-mean", cu_seqlens=d["cu"]),
    "aggregate": lambda d: rlk.aggregate(d["values"], d["mask"], "seq-mean-token-mean"),
    "sequence_sums": lambda d: rlk.sequence_sums(d["values"], d["mask"]),
    "sequence_means": lambda d: rlk.sequence_means(d["values"].view(-1), d["mask"].view(-1), d["cu"]),
    "broadcast_to_tokens": lambda d: rlk.broadcast_to_tokens(d["values"][:, 0], d["mask"]),
    "spans_to_mask": lambda d: rlk.spans_to_mask(d["spans"], 16),
    "token_logprobs under one mask": lambda d: rlk.token_logprobs(d["logits"], d["targets"], vocab_mask=d["columns"]),
    # The arguments and forms that the calls above leave out: packed batches, weights, normalisers, numbers as tensors.
    "linear_policy_loss of a packed batch": lambda d: rlk.linear_policy_loss(
        d["hidden"].view(-1, H),
        d["weight"],
        d["targets"].view(-1),
        d["old"].view(-1),
        d["per_row"],
        d["mask"].view(-1),
        bias=d["bias"],
        chunk_tokens=4,
        cu_seqlens=d["cu"],
        aggregation="prompt-mean",
        normalizers={"group_ids": d["rows"], "num_sequences": d["count"]},
        return_metrics=True,
    ),
    "linear_sft_loss of a packed batch": lambda d: rlk.linear_sft_loss(
        d["hidden"].view(-1, H),
        d["weight"],
        d["targets"].view(-1),
        d["mask"].view(-1),
        bias=d["bias"],
        chunk_tokens=4,
        cu_seqlens=d["cu"],
        sample_weights=d["per_row"],
        aggregation="rollout-mean",
        normalizers={"rollout_ids": d["rows"], "num_sequences": d["count"]},
    ),
    "linear_sft_loss of weights": lambda d: rlk.linear_sft_loss(
        d["hidden"], d["weight"], d["targets"], d["mask"], weights=d["token_weights"], chunk_tokens=4
    ),
    "linear_dpo_loss of averages": lambda d: rlk.linear_dpo_loss(
        d["hidden"].view(-1, H),
        d["weight"],
        d["targets"].view(-1),
        d["mask"].view(-1),
        cu_seqlens=d["answers"],
        chunk_tokens=4,
        loss_type="sigmoid_norm",
        temperature=d["temperature"].view(-1),
        ref_chosen_logps=d["pair_c"][:2],
        ref_rejected_logps=d["pair_d"][:2],
        chosen_lengths=d["lengths"][:2],
        rejected_lengths=d["lengths"][2:4],
    ),
    "linear_unpaired_preference_loss of a packed batch": lambda d: rlk.linear_unpaired_preference_loss(
        d["hidden"].view(-1, H),
        d["weight"],
        d["targets"].view(-1),
        d["pair_c"][:3],
        d["groups"][:3] == 4,
        d["mask"].view(-1),
        chunk_tokens=4,
        temperature=d["temperature"].view(-1),
        cu_seqlens=d["cu"],
        kl=d["number"],
        desirable_weight=1.05,
        undesirable_weight=0.7,
    ),
    "linear_unpaired_preference_loss of bco": lambda d: rlk.linear_unpaired_preference_loss(
        d["hidden"],
        d["weight"],
        d["targets"],
        d["pair_c"][:3],
        d["groups"][:3] == 4,
        d["mask"],
        chunk_tokens=4,
        loss_type="bco",
        delta=d["number"],
    ),
    "policy_loss of a packed batch": lambda d: rlk.policy_loss(
        d["logprobs"].view(-1),
        d["old"].view(-1),
        d["per_row"],
        d["mask"].view(-1),
        objective="dual_clip",
        cu_seqlens=d["cu"],
        ratio_level="sequence_token",
        aggregation="fixed-horizon",
        normalizers={"horizon": d["count"], "num_sequences": d["count"]},
        return_metrics=True,
    ),
    "policy_loss of sums": lambda d: rlk.policy_loss(
        d["logprobs"], d["old"], d["per_row"][:, None], d["mask"], ratio_level="sequence_sum"
    ),
    "policy_loss of weights": lambda d: rlk.policy_loss(
        d["logprobs"],
        d["old"],
        d["per_row"],
        d["mask"],
        weights=d["token_weights"],
        objective="sapo",
        entropy=d["entropy"],
        entropy_coef=0.1,
    ),
    "logits_policy_loss of a packed batch": lambda d: rlk.logits_policy_loss(
        d["logits"].view(-1, V),
        d["targets"].view(-1),
        d["old"].view(-1),
        d["per_row"],
        d["mask"].view(-1),
        cu_seqlens=d["cu"],
        entropy_coef=0.1,
        aggregation="global-token-mean",
        normalizers={"batch_num_tokens": d["count"]},
        return_metrics=True,
    ),
    "value_loss of a packed batch": lambda d: rlk.value_loss(
        d["values"].view(-1),
        d["old_values"].view(-1),
        d["returns"].view(-1),
        d["mask"].view(-1),
        cu_seqlens=d["cu"],
        aggregation="seq-mean-token-sum",
        normalizers={"num_sequences": d["count"]},
    ),
    "value_loss of weights": lambda d: rlk.value_loss(
        d["values"], None, d["returns"], d["mask"], weights=d["token_weights"]
    ),
    "unpaired_preference_loss of a number": lambda d: rlk.unpaired_preference_loss(
        d["pair_a"], d["pair_c"], d["groups"] == 4, kl=d["number"], desirable_weight=1.05, undesirable_weight=0.7
    ),
    "unpaired_preference_loss of bco": lambda d: rlk.unpaired_preference_loss(
        d["pair_a"], d["pair_c"], d["groups"] == 4, loss_type="bco", delta=d["number"]
    ),
    "sft_loss of a packed batch": lambda d: rlk.sft_loss(
        d["logits"].view(-1, V),
        d["targets"].view(-1),
        d["mask"].view(-1),
        cu_seqlens=d["cu"],
        sample_weights=d["per_row"],
        aggregation="seq-mean-token-sum-norm",
        normalizers={"horizon": d["count"]},
    ),
    "sft_loss of weights": lambda d: rlk.sft_loss(d["logits"], d["targets"], d["mask"], weights=d["token_weights"]),
    "logprobs_sft_loss of a packed batch": lambda d: rlk.logprobs_sft_loss(
        d["logprobs"].view(-1),
        d["mask"].view(-1),
        cu_seqlens=d["cu"],
        aggregation="group-mean",
        normalizers={"group_ids": d["rows"]},
    ),
    "logprobs_sft_loss of weights": lambda d: rlk.logprobs_sft_loss(
        d["logprobs"], d["mask"], weights=d["token_weights"], sample_weights=d["advantages"]
    ),
    "gae of a packed batch": lambda d: rlk.gae(
        d["rewards"].view(-1),
        d["values"].view(-1),
        d["mask"].view(-1),
        lam=0.9,
        gamma=0.95,
        cu_seqlens=d["cu"],
        bootstrap_values=d["per_row"],
    ),
    "group_advantages by length": lambda d: rlk.group_advantages(
        d["pair_c"], d["groups"], baseline="length-mean", lengths=d["lengths"], scale="batch-std"
    ),
    "token_weights of prompts": lambda d: rlk.token_weights(
        d["mask"], "prompt-mean", group_ids=d["rows"], num_sequences=d["count"], scale=0.3, dtype=torch.float64
    ),
    "token_weights of whole groups": lambda d: rlk.token_weights(
        d["mask"], "prompt-mean", group_ids=d["rows"], group_tokens=d["lengths"][:3]
    ),
    "token_weights of rows of groups": lambda d: rlk.token_weights(
        d["mask"], "group-mean", group_ids=d["rows"], group_rows=d["lengths"][:3]
    ),
    "token_weights of rollouts": lambda d: rlk.token_weights(d["mask"], "rollout-mean", rollout_ids=d["rows"]),
    "token_weights of a horizon": lambda d: rlk.token_weights(
        d["mask"], "fixed-horizon", horizon=d["count"], dtype=torch.float64
    ),
    "token_weights of all ranks": lambda d: rlk.token_weights(
        d["mask"], batch_num_tokens=d["count"], dp_size=3, dtype=torch.float64
    ),
    "aggregate of a packed batch": lambda d: rlk.aggregate(
        d["values"].view(-1), d["mask"].view(-1), "seq-mean-token-sum", cu_seqlens=d["cu"], num_sequences=d["count"]
    ),
    "aggregate of weights": lambda d: rlk.aggregate(
        d["values"], d["mask"], "seq-mean-token-mean", weights=d["token_weights"]
    ),
    "aggregate of prompts": lambda d: rlk.aggregate(d["values"], d["mask"], "prompt-mean", group_ids=d["rows"]),
    "aggregate of whole groups": lambda d: rlk.aggregate(
        d["values"], d["mask"], "prompt-mean", group_ids=d["rows"], group_tokens=d["lengths"][:3]
    ),
    "aggregate of rows of groups": lambda d: rlk.aggregate(
        d["values"], d["mask"], "group-mean", group_ids=d["rows"], group_rows=d["lengths"][:3]
    ),
    "aggregate of rollouts": lambda d: rlk.aggregate(d["values"], d["mask"], "rollout-mean", rollout_ids=d["rows"]),
    "aggregate of all ranks": lambda d: rlk.aggregate(d["values"], d["mask"], batch_num_tokens=d["count"]),
    "aggregate of a horizon": lambda d: rlk.aggregate(d["values"], d["mask"], "fixed-horizon", horizon=d["count"]),
    "sequence_sums of a packed batch": lambda d: rlk.sequence_sums(d["values"].view(-1), d["mask"].view(-1), d["cu"]),
    "broadcast_to_tokens of a packed batch": lambda d: rlk.broadcast_to_tokens(
        d["values"][:, 0], d["mask"].view(-1), d["cu"]
    ),
}

CALLS |= rollout_calls.calls(rlk) | divergence_calls.calls(rlk) | packing_calls.calls(rlk)
CALLS |= masked_head_calls.calls(rlk)


def tensors(x):
    """Every tensor in a result: alone, in a tuple, in a dict of metrics."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in (x.values() if isinstance(x, dict) else x or ()) for t in tensors(part)]


def call(name, d, seed=3, through=lambda f, d: f(d)):
    """Results and gradients, with cotangents that are not 1. ``through(f, d)`` calls ``f(d)``."""
    d = {k: v.detach().requires_grad_() if k in TRAINED else v for k, v in d.items()}
    results = tensors(through(CALLS[name], d))
    return [t.detach() for t in results] + gradients(results, [d[k] for k in TRAINED], seed)


def gradients(results, inputs, seed=3):
    # A statistic without a gradient refuses to be trained.
    trained = [t for t in results if t.requires_grad and type(t.grad_fn).__name__ != "_RefusalBackward"]
    draw = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(t.shape, generator=draw, dtype=torch.float32, device="cpu").to(t.dtype) for t in trained]
    found = torch.autograd.grad(trained, inputs, upstream, allow_unused=True) if trained else ()
    return [g for g in found if g is not None]


def call_with(name, d, change):
    """The same with arguments that ``change(argument, tensor)`` gives; the gradients are theirs."""
    d, leaves = {k: v.detach().requires_grad_() if k in TRAINED else v for k, v in d.items()}, []

    def at_the_door(_, argument, x):
        y = change(argument, x.detach())
        if x.requires_grad:
            leaves.append(y.requires_grad_())
        return y

    with arguments(at_the_door):
        results = tensors(CALLS[name](d))
    return [t.detach() for t in results] + gradients(results, leaves)


def tensor_arguments(name, d=None):
    """The tensor arguments of a call: their names and what was passed."""
    seen = {}
    call_with(name, data() if d is None else d, lambda argument, x: seen.setdefault(argument, x))
    return list(seen.items())


def tensor_arguments_of(name):
    """Every ``(function, argument)`` of a call that gets a tensor; a call may use several functions."""
    seen = []
    with arguments(lambda function, argument, x: seen.append((function, argument)) or x):
        CALLS[name](data())
    return seen


def policy(x, targets, columns, **options):
    """Loss and gradient of the fused pass, with KL and entropy terms.

    Weights of 1: a row's gradient then depends on that row alone.
    """
    x, options = x.detach().requires_grad_(), {"weights": torch.ones_like(columns[0]), **options}
    loss = rlk.logits_policy_loss(
        x, targets, *columns[:2], ref_logprobs=columns[2], kl="k2", kl_coef=0.1, entropy_coef=0.2, **options
    )
    return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(0.7, dtype=loss.dtype))[0]


def rows_of(x, targets, g, **options):
    x = x.detach().requires_grad_()
    stats = rlk.token_stats(x, targets, outputs=ALL, kl="exact", **options)
    (gradient,) = torch.autograd.grad((stats.logprobs, stats.entropy, stats.kl), x, g)
    return [t.detach() for t in stats] + [gradient]
