"""Where the host reads a device, without a device: tensors on ``meta`` take the ways of an accelerator, and have
nothing that could be read.
"""

import pytest
import torch
import verl_cases

import rlkernels as rlk
from rlkernels import ops
from rlkernels.aggregation import AGGREGATIONS
from rlkernels.backends import eager
from rlkernels.integrations import verl
from rlkernels.linear import token_stats
from rlkernels.losses.preference_types import KINDS
from rlkernels.losses.unpaired_preference import LOSS_TYPES
from rlkernels.objectives import OBJECTIVES
from rlkernels.ops import register

N, L, H, V = 4, 8, 16, 37
DTYPES = (torch.float32, torch.bfloat16)
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")


def _made_there(function):
    """Of numbers on the host: the copy would wait for the device."""

    def call(data, *arguments, device=None, **options):
        assert isinstance(data, torch.Tensor) or str(device) != "meta", f"{data!r} is copied to the device"
        return function(data, *arguments, device=device, **options)

    return call


def _widened(function):
    """A product with ``out_dtype``, by shape alone: torch 2.8 to 2.11 know it on devices and not on "meta"."""

    def call(*tensors, out_dtype=None, out=None, **options):
        if out_dtype is None or not tensors[0].is_meta:
            return function(*tensors, **options) if out is None else function(*tensors, out=out, **options)
        found = made(tensors[-2].shape[0], tensors[-1].shape[1], dtype=out_dtype)
        assert out is None or (out.shape, out.dtype) == (found.shape, found.dtype)
        return found if out is None else out

    return call


@pytest.fixture(autouse=True, scope="module")
def dynamo_has_seen_torch():
    """It lists torch's functions when it first compiles; with the patched ones in the list it could not trace the
    others later.
    """
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def on_an_accelerator(monkeypatch):
    """Kernels are those of plain torch; what calls them is ours.

    The heads' own ops are opened: their fakes would hide the loop over chunks.
    """
    monkeypatch.setattr(ops, "serving", lambda *a, **of: "triton")
    for module in (ops, register):
        monkeypatch.setattr(module, "run", lambda op, backend, *a: getattr(eager, op)(*a))
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _made_there(getattr(torch, name)))
    for name, tensors in (("mm", (A, A.t())), ("addmm", (made(N, N), A, A.t()))):
        try:
            getattr(torch, name)(*(x.bfloat16() for x in tensors), out_dtype=torch.float32)
        except TypeError:
            monkeypatch.setattr(torch, name, _widened(getattr(torch, name)))
    monkeypatch.setattr(token_stats, "linear_stats_backward", token_stats._linear_stats_backward)
    recorded = register._recorded(
        "linear_stats", token_stats._linear_stats, token_stats._linear_stats_grad, token_stats._linear_stats_setup
    )
    monkeypatch.setattr(token_stats, "linear_stats", recorded)


@pytest.fixture
def asked(monkeypatch):
    """What the host asked of a device, answered as if every token were live."""
    asked, tolist, nonzero = [], torch.Tensor.tolist, torch.Tensor.nonzero

    def numbers(x):
        if not x.is_meta:
            return tolist(x)
        asked.append("tolist")
        # Two counts, or the ends of the sequences.
        return [N * L] * 2 if len(x) == 2 else [i * N * L // (len(x) - 1) for i in range(len(x))]

    def places(x):
        if not x.is_meta:
            return nonzero(x)
        asked.append("nonzero")
        return torch.empty(x.numel(), x.dim(), dtype=torch.long, device="meta")

    monkeypatch.setattr(torch.Tensor, "tolist", numbers)
    monkeypatch.setattr(torch.Tensor, "nonzero", places)
    return asked


def made(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def whole(*shape):
    return made(*shape, dtype=torch.long)


MASK, A = made(N, L, dtype=torch.bool), made(N, L)
CU, GOOD = whole(N + 1), made(N, dtype=torch.bool)


def heads(dtype, packed=False):
    """``{name: call}``: every loss of a head; the call takes its options and gives a scalar."""
    rows = (N * L,) if packed else (N, L)
    h, w, b = (
        made(*rows, H, dtype=dtype, grad=True),
        made(V, H, dtype=dtype, grad=True),
        made(V, dtype=dtype, grad=True),
    )
    y, mask, a, cu = whole(*rows), MASK.view(rows), A.view(rows), {"cu_seqlens": CU} if packed else {}
    references = {"ref_chosen_logps": made(N // 2), "ref_rejected_logps": made(N // 2)}

    def policy(level, **more):
        def call(**o):
            options = {"bias": b, "ratio_level": level, "kl_coef": 0.1, "ref_logprobs": a, **cu, **more, **o}
            return rlk.linear_policy_loss(h, w, y, a, a, mask, **options)

        return call

    def pairs(name):
        given = {"label_smoothing": 0.1} if name == "exo_pair" else {"tpo_alpha": 0.0} if KINDS[name].gold else {}
        given |= {"chosen_rewards": made(N // 2), "rejected_rewards": made(N // 2)} if name == "rpo" else {}
        return lambda **o: rlk.linear_dpo_loss(
            h, w, y, mask, bias=b, loss_type=name, **given, **cu, **(references if KINDS[name].reference else {}), **o
        )

    def answers(name):
        given = {"kto": {"kl": 0.1}, "bco": {"delta": 0.1}}.get(name, {})
        return lambda **o: rlk.linear_unpaired_preference_loss(
            h, w, y, made(N), GOOD, mask, bias=b, loss_type=name, **given, **cu, **o
        )

    def stats(**o):
        found = rlk.linear_token_stats(h, w, y, bias=b, temperature=a, **o)
        return (found.logprobs + found.entropy).sum()

    return {
        "stats": stats,
        "sft": lambda **o: rlk.linear_sft_loss(h, w, y, mask, bias=b, **o),
        **{f"policy {level}": policy(level) for level in LEVELS},
        "policy with entropy": policy("token", entropy_coef=0.1),
        "policy of sequences with entropy": policy("sequence", entropy_coef=0.1),
        **{f"pairs {name}": pairs(name) for name in KINDS},
        **{f"answers {name}": answers(name) for name in LOSS_TYPES},
    }


@pytest.mark.fault(48)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chunk", [None, 16], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("name", heads(torch.float32))
def test_with_a_bound_the_host_reads_nothing_of_a_head(name, chunk, packed, dtype):
    loss = heads(dtype, packed)[name](max_live_tokens=N * L, chunk_tokens=chunk)
    loss.backward()
    assert loss.is_meta and loss.dtype == torch.float32


@pytest.mark.fault(48)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chunk", [None, 4], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("name", heads(torch.float32))
def test_without_one_it_reads_once_per_call(name, chunk, packed, asked):
    loss = heads(torch.bfloat16, packed)[name](chunk_tokens=chunk)
    assert len(asked) == 1, asked
    loss.backward()
    assert len(asked) == 1 + (name == "stats"), asked  # whose backward multiplies the rows that have a gradient


def leaf(*shape):
    return made(*shape, grad=True)


LOGITS, TARGETS, ONE, TWO = leaf(N, L, V), whole(N, L), leaf(N, L), leaf(N)
IDS = {
    "prompt-mean": {"group_ids": whole(N)},
    "rollout-mean": {"rollout_ids": whole(N)},
    "group-mean": {"group_ids": whole(N)},
    "fixed-horizon": {"horizon": 9},
    "global-token-mean": {"batch_num_tokens": made()},
}
OF_ROWS = {
    "gmpo": {},
    "vespo": {},
    "fipo": {},
    "real": {"group_size": 2},
    "kl_cov": {},
    "clip_cov": {"clip_cov_tokens": MASK},
}


def corrected(function, *inputs, **options):
    """A policy loss with weights of the engine and the off-policy mask."""
    correction = rlk.Correction(high=number(), batch_normalize=True, opsm_delta=number())
    return function(*inputs, A, A, MASK, rollout_logprobs=A, correction=correction, **options)


CALLS = {
    "token_stats": lambda: rlk.token_stats(LOGITS, TARGETS, temperature=A).logprobs.sum(),
    "token_stats, one temperature": lambda: rlk.token_stats(LOGITS, TARGETS, temperature=made()).logprobs.sum(),
    "token_stats, a temperature per sequence": lambda: rlk.token_stats(
        LOGITS, TARGETS, temperature=made(N)
    ).logprobs.sum(),
    "linear_sft_loss, one temperature": lambda: rlk.linear_sft_loss(
        leaf(N, L, H), leaf(V, H), TARGETS, temperature=made(), max_live_tokens=N * L
    ),
    "linear_token_logprobs, a temperature per sequence": lambda: rlk.linear_token_logprobs(
        leaf(N, L, H), leaf(V, H), TARGETS, temperature=made(N, 1), max_live_tokens=N * L
    ).sum(),
    "sft_loss": lambda: rlk.sft_loss(LOGITS, TARGETS, MASK),
    "token_divergences": lambda: rlk.token_divergences(LOGITS, LOGITS.detach(), MASK, temperature=A).sum(),
    **{
        f"divergence_loss {kind}": lambda kind=kind: rlk.divergence_loss(LOGITS, LOGITS.detach(), MASK, kind=kind)
        for kind in ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
    },
    "divergence_loss of top log-probabilities": lambda: rlk.divergence_loss(
        LOGITS, teacher_topk=(whole(N, L, 3), made(N, L, 3)), mask=MASK
    ),
    "linear_distillation_loss": lambda: rlk.linear_distillation_loss(
        leaf(N, L, H), leaf(V, H), made(N, L, 3), made(V + 1, 3), MASK, max_live_tokens=N * L
    ),
    "linear_distillation_loss of top log-probabilities": lambda: rlk.linear_distillation_loss(
        leaf(N, L, H), leaf(V, H), teacher_topk=(whole(N, L, 3), made(N, L, 3)), max_live_tokens=N * L
    ),
    "logprobs_sft_loss": lambda: rlk.logprobs_sft_loss(ONE, MASK),
    **{
        f"logits_policy_loss {level}": lambda level=level: rlk.logits_policy_loss(
            LOGITS, TARGETS, A, A, MASK, ratio_level=level, entropy_coef=0.1
        )
        for level in LEVELS
    },
    **{
        f"policy_loss {mode}": lambda mode=mode: rlk.policy_loss(
            ONE, A, A, MASK, aggregation=mode, normalizers=IDS.get(mode)
        )
        for mode in AGGREGATIONS
    },
    **{
        f"aggregate {mode}": lambda mode=mode: rlk.aggregate(ONE, MASK, mode, **IDS.get(mode, {}))
        for mode in AGGREGATIONS
    },
    "policy_loss packed": lambda: rlk.policy_loss(
        ONE.view(-1), A.view(-1), A.view(-1), MASK.view(-1), cu_seqlens=CU, ratio_level="sequence"
    ),
    **{
        f"policy_loss by {name}": lambda name=name, more=more: rlk.policy_loss(ONE, A, A, MASK, objective=name, **more)
        for name, more in OF_ROWS.items()
    },
    "policy_loss by a2po": lambda: rlk.policy_loss(
        ONE, None, None, MASK, objective="a2po", rewards=made(N), value_pool=made(N, 3), ref_logprobs=A
    ),
    "logits_policy_loss by real": lambda: rlk.logits_policy_loss(
        LOGITS, TARGETS, A, A, MASK, objective="real", group_ids=whole(N)
    ),
    "linear_policy_loss by fipo": lambda: rlk.linear_policy_loss(
        leaf(N, L, H), leaf(V, H), TARGETS, A, A, MASK, objective="fipo", max_live_tokens=N * L
    ),
    "policy_loss of a correction": lambda: corrected(rlk.policy_loss, ONE, entropy=A, top_entropy_fraction=number()),
    "logits_policy_loss of a correction": lambda: corrected(rlk.logits_policy_loss, LOGITS, TARGETS),
    "linear_policy_loss of a correction": lambda: corrected(
        rlk.linear_policy_loss, leaf(N, L, H), leaf(V, H), TARGETS, top_entropy_fraction=0.5, max_live_tokens=N * L
    ),
    "value_loss": lambda: rlk.value_loss(ONE, A, A, MASK, clip_range=0.2),
    "pairwise_reward_loss": lambda: rlk.pairwise_reward_loss(TWO, made(N)),
    "dpo_loss": lambda: rlk.dpo_loss(TWO, TWO * 2, made(N), made(N), pair_weights=made(N)),
    "unpaired_preference_loss": lambda: rlk.unpaired_preference_loss(TWO, made(N), GOOD, kl=made()),
    "sequence_means": lambda: rlk.sequence_means(ONE.view(-1), MASK.view(-1), CU).sum(),
    "broadcast_to_tokens": lambda: rlk.broadcast_to_tokens(TWO, MASK).sum(),
    "reward_scores": lambda: rlk.reward_scores(leaf(N, L, H), leaf(1, H), attention_mask=MASK).sum(),
}


def number():
    """A coefficient that the device alone knows."""
    return made()


SCHEDULED = {
    **{
        f"policy_loss {name}": lambda name=name, given=given: rlk.policy_loss(
            ONE, A, A, MASK, objective=name, **{k: number() for k in given}
        )
        for name, given in {
            "ppo_clip": ("clip_low", "clip_high"),
            "dual_clip": ("dual_clip",),
            "cispo": ("clip_low", "clip_high"),
            "sapo": ("tau_pos", "tau_neg"),
        }.items()
    },
    "policy_loss terms": lambda: rlk.policy_loss(
        ONE, A, A, MASK, kl_coef=number(), ref_logprobs=A, entropy=ONE, entropy_coef=number(), return_metrics=True
    )[0],
    **{
        f"logits_policy_loss {level}": lambda level=level: rlk.logits_policy_loss(
            LOGITS,
            TARGETS,
            A,
            A,
            MASK,
            ratio_level=level,
            kl_coef=number(),
            ref_logprobs=A,
            entropy_coef=number(),
            clip_low=number(),
        )
        for level in LEVELS
    },
    **{
        f"linear_policy_loss {level}": lambda level=level: heads(torch.bfloat16)[f"policy {level}"](
            max_live_tokens=N * L, entropy_coef=number(), clip_low=number(), clip_high=0.3
        )
        for level in LEVELS
    },
    "value_loss": lambda: rlk.value_loss(ONE, A, A, MASK, clip_range=number(), return_metrics=True)[0],
    "pairwise_reward_loss": lambda: rlk.pairwise_reward_loss(TWO, made(N), center_coef=number()),
    **{
        f"dpo_loss {name}": lambda name=name: rlk.dpo_loss(
            TWO,
            TWO * 2,
            made(N),
            made(N),
            loss_type=(name,),
            beta=number(),
            loss_weights=(number(),),
            chosen_lengths=whole(N),
            rejected_lengths=whole(N),
            **{
                k: number()
                for k in ("label_smoothing", "simpo_gamma", "alphapo_alpha", "discopop_tau", "cpo_alpha")
                + ("dpop_lambda", "rpo_eta")
                if k in KINDS[name].takes
            },
            **({"gold_logps": made(N), "gold_lengths": whole(N), "tpo_alpha": number()} if KINDS[name].gold else {}),
            **({"chosen_rewards": made(N), "rejected_rewards": made(N)} if name == "rpo" else {}),
        )
        for name in KINDS
    },
    "dpo_loss alpha": lambda: rlk.dpo_loss(
        TWO, TWO * 2, made(N), made(N), f_divergence="alpha_divergence", alpha=number()
    ),
    "linear_dpo_loss": lambda: heads(torch.bfloat16)["pairs sigmoid"](
        max_live_tokens=N * L, beta=number(), label_smoothing=number()
    ),
    **{
        f"unpaired_preference_loss {name}": lambda name=name: rlk.unpaired_preference_loss(
            TWO,
            made(N),
            GOOD,
            loss_type=name,
            beta=number(),
            desirable_weight=number(),
            undesirable_weight=number(),
            **{"kto": {"kl": number()}, "bco": {"delta": number()}}.get(name, {}),
        )
        for name in LOSS_TYPES
    },
    "linear_unpaired_preference_loss": lambda: heads(torch.bfloat16)["answers kto"](
        max_live_tokens=N * L, beta=number(), desirable_weight=number()
    ),
    "normalisers": lambda: rlk.policy_loss(
        ONE, A, A, MASK, normalizers={"batch_num_tokens": whole(), "scale": number(), "dp_size": whole()}
    ),
}
PLAIN = {
    "gae": lambda: rlk.gae(A, A, MASK),
    "gae packed": lambda: rlk.gae(A.view(-1), A.view(-1), MASK.view(-1), cu_seqlens=CU),
    "discounted_returns": lambda: (rlk.discounted_returns(A, MASK),),
    "masked_whiten": lambda: (rlk.masked_whiten(A, MASK),),
    "masked_whiten of a part": lambda: (rlk.masked_whiten(A, MASK, moments=rlk.masked_moments(A, MASK)),),
    "masked_whiten of numbers": lambda: (rlk.masked_whiten(A, MASK, moments=rlk.Moments(8, 0.5, 3.0)),),
    "merge_moments": lambda: rlk.merge_moments([rlk.masked_moments(A), rlk.masked_moments(A, MASK)]),
    "group_advantages": lambda: (rlk.group_advantages(made(N), whole(N)),),
    "group_advantages of a part": lambda: (
        rlk.group_advantages(made(N), whole(N), scale="batch-std", moments=rlk.masked_moments(A)),
    ),
    **{
        f"gae {name}": lambda options=options: rlk.gae(A, A, MASK, **options)
        for name, options in {"of turns": {"turn_ends": MASK}, "with lambdas": {"lam": made(N)}}.items()
    },
    "discounted_returns with resets": lambda: (rlk.discounted_returns(A, MASK, masked="reset"),),
    "vtrace": lambda: rlk.vtrace(A, A, A, A, MASK, terminated=MASK, bootstrap_values=made(N)),
    "vtrace packed": lambda: rlk.vtrace(*[A.view(-1)] * 4, MASK.view(-1), cu_seqlens=CU),
    "rollout_gae": lambda: rlk.rollout_gae(A, A, time_dim=1, dones=MASK, terminated=MASK, next_values=A),
    "rollout_gae of starts": lambda: rlk.rollout_gae(A, A, made(N), time_dim=1, dones=MASK, dones_at="start"),
    "group_advantages of several rewards": lambda: (
        rlk.group_advantages(A, whole(N), baseline="runner-up", singleton="scaled", reward_weights=made(L)),
    ),
    "broadcast_advantages": lambda: (rlk.broadcast_advantages(made(N), whole(N), whole(N)),),
    "step_advantages": lambda: (rlk.step_advantages(A, MASK, whole(N), MASK),),
    "gigpo_advantages": lambda: (
        rlk.gigpo_advantages(*[made(N)] * 2, *[whole(N)] * 2, step_weight=number(), trajectory_ids=whole(N)),
    ),
    "optimal_token_advantages": lambda: rlk.optimal_token_advantages(A, A, A, whole(N), MASK, alignment="live"),
    "optimal_token_advantages packed": lambda: rlk.optimal_token_advantages(
        *[A.view(-1)] * 3, whole(N), MASK.view(-1), cu_seqlens=CU
    ),
    **{
        f"assemble_rewards {placement}": lambda placement=placement: (
            rlk.assemble_rewards(
                made(N), MASK, logprobs=A, ref_logprobs=A, kl_coef=number(), score_clip=(-1, 1), placement=placement
            ),
        )
        for placement in ("last-action", "trl-end", "deepspeed-end")
    },
    "assemble_rewards packed": lambda: (rlk.assemble_rewards(made(N), MASK.view(-1), cu_seqlens=CU),),
    "extended_mask": lambda: (rlk.extended_mask(MASK),),
    "process_sequences": lambda: rlk.process_sequences(whole(N, L), 1, eos_id=1, pad_id=0),
    "length_penalty": lambda: (rlk.length_penalty(whole(N), max_length=4, buffer=2),),
    "truncation_penalty": lambda: (rlk.truncation_penalty(made(N), whole(N), 0.5),),
    "dynamic_sampling_mask": lambda: (rlk.dynamic_sampling_mask(made(N), whole(N)),),
    "rollout_weights": lambda: (rlk.rollout_weights(A, A, MASK, high=number(), batch_normalize=True),),
    "metrics of rollout_weights": lambda: rlk.rollout_weights(A, A, MASK, return_metrics=True)[1].values(),
    "rollout_weights of sequences": lambda: (
        rlk.rollout_weights(
            A.view(-1), A.view(-1), MASK.view(-1), level="sequence", mode="mask", gate="kl", high=1.0, cu_seqlens=CU
        ),
    ),
    "rho_correction": lambda: (
        rlk.rho_correction(A, A, MASK, advantages=A, gate="tv", mask_high=number(), clamp_low=0.1),
    ),
    "rejection_mask": lambda: (rlk.rejection_mask(A, A, MASK, rules={"token_k1": 2.0, "seq_max_k3": 1.0}),),
    "off_policy_sequence_mask": lambda: (rlk.off_policy_sequence_mask(A, A, A, MASK, delta=number()),),
    "m2po_mask": lambda: (rlk.m2po_mask(A, A, MASK, threshold=number()),),
    "rollout_metrics": lambda: rlk.rollout_metrics(A, A, MASK).values(),
    "top_entropy_mask": lambda: (rlk.top_entropy_mask(A, MASK, number()),),
    "token_weights": lambda: (rlk.token_weights(MASK, "seq-mean-token-mean"),),
}


def kl_term():
    return rlk.KLTerm(value_clamp=5.0, ratio_weighted=True, ratio_level="loss", mask=MASK)


METRICS = {
    **{
        f"policy_loss {level}": lambda level=level: rlk.policy_loss(
            ONE, A, A, MASK, ratio_level=level, kl_coef=0.1, ref_logprobs=A, return_metrics=True
        )
        for level in LEVELS
    },
    **{
        f"policy_loss {level}, a KL term": lambda level=level: rlk.policy_loss(
            ONE, A, A, MASK, ratio_level=level, kl=kl_term(), kl_coef=number(), ref_logprobs=A, return_metrics=True
        )
        for level in LEVELS
    },
    **{
        f"{kl} of logits": lambda kl=kl: rlk.logits_policy_loss(
            LOGITS, TARGETS, A, A, MASK, kl=kl, kl_coef=number(), ref_logits=made(N, L, V), return_metrics=True
        )
        for kl in ("reverse_kl", "forward_kl", "k3")
    },
    **{
        f"head: policy {level}, a KL term": lambda level=level: heads(torch.bfloat16)[f"policy {level}"](
            max_live_tokens=N * L, kl=kl_term(), kl_coef=number(), return_metrics=True
        )
        for level in ("token", "sequence")
    },
    "head: forward_kl": lambda: heads(torch.bfloat16)["policy token"](
        max_live_tokens=N * L,
        kl="forward_kl",
        kl_coef=number(),
        ref_hidden=made(N, L, H, dtype=torch.bfloat16),
        ref_weight=made(V, H, dtype=torch.bfloat16),
        return_metrics=True,
    ),
    "logits_policy_loss": lambda: rlk.logits_policy_loss(LOGITS, TARGETS, A, A, MASK, return_metrics=True),
    "value_loss": lambda: rlk.value_loss(ONE, A, A, MASK, clip_range=0.2, return_metrics=True),
    "sft_loss": lambda: rlk.sft_loss(LOGITS, TARGETS, MASK, return_metrics=True),
    "divergence_loss": lambda: rlk.divergence_loss(LOGITS, LOGITS.detach(), MASK, return_metrics=True),
    "dpo_loss": lambda: rlk.dpo_loss(TWO, TWO * 2, made(N), made(N), return_metrics=True),
    "unpaired_preference_loss": lambda: rlk.unpaired_preference_loss(TWO, made(N), GOOD, kl=0.1, return_metrics=True),
    **{
        f"head: {name}": lambda name=name: heads(torch.bfloat16)[name](max_live_tokens=N * L, return_metrics=True)
        for name in ("sft", "policy token", "policy sequence", "pairs sigmoid", "answers kto")
    },
}


@pytest.mark.fault(48)
@pytest.mark.parametrize("name", METRICS)
def test_no_metric_reads_the_device(name):
    loss, metrics = METRICS[name]()
    loss.backward()
    assert metrics and all(x.is_meta for x in metrics.values())


@pytest.mark.fault(48)
@pytest.mark.parametrize("name", CALLS)
def test_no_loss_reads_the_device(name):
    loss = CALLS[name]()
    loss.backward()
    assert loss.is_meta


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", SCHEDULED)
def test_no_coefficient_is_read_from_the_device(name):
    loss = SCHEDULED[name]()
    loss.backward()
    assert loss.is_meta and loss.dtype == torch.float32


@pytest.mark.fault(48)
@pytest.mark.parametrize("name", PLAIN)
def test_nothing_before_a_loss_reads_the_device(name):
    assert all(x.is_meta for x in PLAIN[name]())


@pytest.mark.fault(48)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_in_plain_torch_reads_the_device(name):
    entry = OBJECTIVES[name]
    columns, params = [made(N, L) for _ in entry.columns], [0.5] * len(entry.params)
    for numbers in (params, [number() for _ in params]):
        for weight in (None, A):
            assert all(x.is_meta for x in eager.elementwise(name, columns, numbers, weight))
        assert all(
            x.is_meta for x in eager.weighted_loss(name, columns[0], [], columns[1:], numbers, MASK, made(), 1.0)
        )


def test_a_read_would_be_seen():
    for read in (
        lambda: bool(MASK.any()),
        lambda: A.tolist(),
        lambda: A.nonzero(),
        lambda: A.cpu(),
        lambda: torch.bincount(TARGETS.view(-1)),
        lambda: torch.tensor(1.0, device="meta"),
        lambda: MASK[MASK],
        lambda: torch.repeat_interleave(A[0], TARGETS[0]),
        lambda: torch.unique(TARGETS),
    ):
        with pytest.raises(Exception):  # noqa: B017  (each has its own)
            read()


VERL = {name: case for name, case in verl_cases.cases(1).items() if not name.startswith("bypass_mode")}


@pytest.mark.parametrize("name", VERL)
def test_the_host_reads_nothing_under_verls_names(name):
    """verl's own losses read three numbers per micro-batch; the index of prompts is an array of the host in verl."""
    case = VERL[name]
    given = {key: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in case.args.items()}
    given = {key: x.to("meta") if torch.is_tensor(x) else x for key, x in given.items()}
    if "index" in given:
        given["index"] = whole(len(given["index"]))
    if isinstance(given.get("config"), dict):
        given["config"] = verl_cases.Config(**given["config"])
    if case.settings is not None:
        given["config"] = verl_cases.config_of(case)
    for key in case.wrt:
        given[key].requires_grad_()
    found = getattr(verl, case.name)(**given)
    first = found[0] if isinstance(found, tuple) else found
    assert first.is_meta
    if case.wrt:
        first.sum().backward()
