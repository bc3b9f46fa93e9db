"""Every loss with ``reduction="none"``: a call, its elements by their formula in float64, their weights in the sum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import rlkernels as rlk

DRAW = torch.Generator().manual_seed(3)
B, L, V, H = 4, 5, 7, 6
MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
FILLED = MASK.any(-1)
TARGETS = torch.randint(V, (B, L), generator=DRAW)
GOOD = torch.tensor([True, False, False, True, True, False])
IDS = torch.tensor([[5, 6, 7, 0], [5, 4, 4, 4], [5, 9, 9, 0], [5, 4, 8, 3]])
GROUPS = torch.tensor([1, 0, 1, 0])


def drawn(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


LOGP = -0.1 - 3 * torch.rand(B, L, generator=DRAW, dtype=torch.float64)
OLD, REF, ENGINE = (LOGP + 0.4 * drawn(B, L) for _ in range(3))
ADV, OF_ROW, FACTOR = drawn(B, L), drawn(B), torch.rand(B, L, generator=DRAW, dtype=torch.float64)
LOGITS, TEACHER, HIDDEN, WEIGHT = drawn(B, L, V), drawn(B, L, V), drawn(B, L, H), drawn(V, H)
REF_HIDDEN, REF_WEIGHT = drawn(B, L, 3), drawn(V, 3)
RHO = drawn(6), drawn(6)


class Case(NamedTuple):
    """``call(leaves, cast, **options)``: the loss, of data that ``cast`` rounds. ``truth(*leaves)``: its elements.

    ``sums``: options of the loss that is summed, and the weights of the elements in it.
    """

    leaves: tuple
    call: Callable[..., Any]
    truth: Callable[..., Any]
    sums: list
    shape: tuple = (B, L)
    dead: torch.Tensor | None = None


def by_tokens():
    mask = MASK.double()
    return [
        ({}, mask / mask.sum()),
        ({"aggregation": "seq-mean-token-sum"}, mask / FILLED.sum()),
        ({"aggregation": "token-sum", "normalizers": {"scale": 0.5}}, 0.5 * mask),
    ]


def by_sequences():
    return [
        ({}, FILLED.double() / FILLED.sum()),
        ({"aggregation": "seq-mean", "normalizers": {"num_sequences": 10}}, FILLED.double() / 10),
    ]


def mean(x):
    return torch.where(MASK, x, 0.0).sum(-1) / MASK.sum(-1).clamp(min=1)


def ppo(logp, old=OLD, advantage=ADV):
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def k3(logp):
    return (REF - logp).expm1() - (REF - logp)


def policy(cast, logp, **options):
    options = {"kl_coef": 0.3, "ref_logprobs": REF, **options}
    options = {k: cast(x) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    return rlk.policy_loss(logp, cast(OLD), options.pop("advantages", cast(ADV)), MASK, **options)


def scored(logits, targets=TARGETS):
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def kl_of(student, teacher, reverse=False):
    p, q = (x.log_softmax(-1) for x in (student, teacher))
    return (p.exp() * (p - q)).sum(-1) if reverse else (q.exp() * (q - p)).sum(-1)


def sft_of_logits(logits, kind="nll", v=1.0, smoothing=0.0, z=0.0):
    logp, norm = scored(logits), logits.logsumexp(-1)
    loss = -(logp.exp().detach() if kind == "dft" else 1.0) * logp
    loss = (1 - smoothing) * loss + smoothing * (norm - logits.mean(-1))
    return v * loss + z * abs(v) * norm**2


def kto(logps):
    rho = logps - RHO[1]
    gap = torch.where(GOOD, 0.5 * (rho - 0.1), 0.5 * (0.1 - rho))
    return (1 - gap.sigmoid()) * torch.where(GOOD, 2.0, 1.0)


def kto_of_batch(logps):
    rho = logps - RHO[1]
    good, bad = rho[GOOD].mean().clamp(min=0), rho[~GOOD].mean().clamp(min=0)
    gap = torch.where(GOOD, 0.5 * (rho - bad), 0.5 * (good - rho))
    return (1 - gap.sigmoid()) * torch.where(GOOD, 2.0, 1.0)


def ranked(scores):
    return torch.stack(
        [
            sum(
                (-torch.nn.functional.logsigmoid(x[a] - x[b]) for a in range(len(x)) for b in range(a + 1, len(x))),
                0 * x.sum(),
            )
            / max(len(x) * (len(x) - 1) // 2, 1)
            for x in scores.split([3, 1, 2])
        ]
    )


def spans(rewards):
    # Row pairs (0, 2) and (1, 3): they differ from column 1 on, and from column 2 on.
    gap = -torch.nn.functional.logsigmoid(rewards[:2] - rewards[2:])
    return torch.stack([gap[0, 1:3].mean(), gap[1, 2:4].mean()])


def gmpo(logp):
    gap = torch.where(MASK, logp - OLD, 0.0)
    held = torch.where(OF_ROW[:, None] > 0, gap.clamp(max=0.4), gap.clamp(min=-0.4))
    return torch.where(FILLED, -OF_ROW * mean(held).exp(), 0.0) + 0.3 * mean(k3(logp))


def real(logp):
    score, total = mean(torch.where(MASK, logp - OLD, 0.0)) / 0.5, []
    for group in GROUPS:
        of = (group == GROUPS) & FILLED
        good, bad = (of & (OF_ROW > 0)), (of & (OF_ROW <= 0))
        both = (1 + score[bad].exp().sum()).log() + (1 + (-score[good]).exp().sum()).log()
        total.append(both if good.any() and bad.any() else 0 * both)
    return torch.where(FILLED, torch.stack(total), 0.0) + 0.3 * mean(k3(logp))


def a2po(logp):
    return torch.where(
        FILLED, (0.01 * (torch.where(MASK, logp - REF, 0.0)).sum(-1) - OF_ROW + 0.7) ** 2, 0.0
    ) + 0.3 * mean(k3(logp))


def vespo(logp):
    gap = torch.where(MASK, (logp - OLD).detach(), 0.0)
    w = gap.sum(-1, keepdim=True)
    k, scale = torch.where(ADV >= 0, 2.0, 3.0), torch.where(ADV >= 0, 3.0, 2.0)
    return -(scale + k * w - scale * w.exp()).exp() * ADV * logp + 0.3 * k3(logp)


def kl_cov(logp):
    gap = logp - OLD
    count = MASK.sum()
    cov = (ADV - (ADV * MASK).sum() / count) * (logp - torch.where(MASK, logp, 0.0).sum() / count)
    order = torch.where(MASK, cov, -torch.inf).flatten().argsort(descending=True)
    chosen = torch.zeros(B * L, dtype=torch.bool)
    chosen[order[: int(0.3 * count)]] = True
    return -gap.exp() * ADV + torch.where(chosen.view(B, L), gap.abs(), 0.0) + 0.3 * k3(logp)


def weighted_kl(logp):
    ratio = (logp - OLD).exp()
    return torch.where(MASK, ppo(logp), 0.0) + 0.3 * torch.where(TOOLS, ratio * k3(logp), 0.0)


TOOLS = torch.tensor([[1, 0, 1, 1, 0]] * 3 + [[0, 0, 0, 0, 0]], dtype=torch.bool)
TERM = rlk.KLTerm("k3", ratio_weighted=True, mask=TOOLS)
VALUES, RETURNS, OLD_VALUES = drawn(B, L), drawn(B, L), drawn(B, L)
STEPS = torch.where(MASK, torch.tensor(2), torch.tensor(-100))
SOFT = torch.where(
    MASK, torch.rand(B, L, generator=DRAW, dtype=torch.float64), torch.tensor(-100.0, dtype=torch.float64)
)


def clipped_error(values):
    free, held = values - RETURNS, OLD_VALUES + (values - OLD_VALUES).clamp(-0.3, 0.3) - RETURNS
    return 0.5 * torch.maximum(free**2, held**2)


def soft_steps(logits):
    a, b = logits[..., [1, 4]].log_softmax(-1).unbind(-1)
    return -SOFT * a - (1 - SOFT) * b


def of_head(function):
    return lambda hidden, weight: function(hidden @ weight.T)


def dpo_of(chosen, rejected):
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))


def answers(hidden, weight):
    return torch.where(MASK, scored(hidden @ weight.T), 0.0).sum(-1)


SFT = {"kind": "dft", "z_loss_coef": 0.1}
EVEN = [({}, torch.ones(6).double() / 6), ({"reduction": "sum"}, torch.ones(6))]
BY_ANSWER = [({}, torch.full((4,), 0.25)), ({"reduction": "sum"}, torch.ones(4))]
PAIR = GOOD[:4]
KTO = {"desirable_weight": 2.0, "beta": 0.5}
A2PO = {
    "rewards": OF_ROW,
    "value_pool": torch.full((B, 3), 0.7, dtype=torch.float64),
    "beta2": 0.01,
    "advantages": None,
}
EXACT = {"kl_coef": 0.3, "kl": "forward_kl"}
CASES = {
    "policy": Case((LOGP,), lambda c, x, **o: policy(c, x, **o), lambda x: ppo(x) + 0.3 * k3(x), by_tokens()),
    "policy, corrected, with a bonus": Case(
        (LOGP, -LOGP),
        lambda c, x, h, **o: policy(c, x, entropy=h, entropy_coef=0.2, correction=FACTOR, **o),
        lambda x, h: FACTOR * ppo(x) + 0.3 * k3(x) - 0.2 * h,
        by_tokens(),
    ),
    "policy, sequence": Case(
        (LOGP,),
        lambda c, x, **o: policy(c, x, ratio_level="sequence", **o),
        lambda x: ppo(mean(x)[:, None], mean(OLD)[:, None]) + 0.3 * k3(x),
        by_tokens(),
    ),
    "policy, sequence_sum": Case(
        (LOGP, -LOGP),
        lambda c, x, h, **o: policy(
            c, x, entropy=h, entropy_coef=0.2, correction=FACTOR, ratio_level="sequence_sum", advantages=OF_ROW, **o
        ),
        lambda x, h: (
            mean(FACTOR) * ppo(mean(x) * MASK.sum(-1), mean(OLD) * MASK.sum(-1), OF_ROW) + mean(0.3 * k3(x) - 0.2 * h)
        ),
        by_sequences(),
        (B,),
    ),
    "policy, a KL of other tokens": Case(
        (LOGP,), lambda c, x, **o: policy(c, x, kl=TERM, **o), weighted_kl, [], dead=~(MASK | TOOLS)
    ),
    "gmpo": Case(
        (LOGP,), lambda c, x, **o: policy(c, x, objective="gmpo", advantages=OF_ROW, **o), gmpo, by_sequences(), (B,)
    ),
    "a2po": Case((LOGP,), lambda c, x, **o: policy(c, x, objective="a2po", **A2PO, **o), a2po, by_sequences(), (B,)),
    "real": Case(
        (LOGP,),
        lambda c, x, **o: policy(c, x, objective="real", group_ids=GROUPS, advantages=OF_ROW, **o),
        real,
        [({}, torch.tensor([0.25, 0.5, 0.25, 0.0]))],  # the mean over two groups, of which one has a single filled row
        (B,),
    ),
    "vespo": Case((LOGP,), lambda c, x, **o: policy(c, x, objective="vespo", **o), vespo, by_tokens()),
    "kl_cov": Case(
        (LOGP,), lambda c, x, **o: policy(c, x, objective="kl_cov", kl_cov_ratio=0.3, **o), kl_cov, by_tokens()
    ),
    "clip_cov": Case(
        (LOGP,),
        lambda c, x, **o: policy(c, x, objective="clip_cov", clip_cov_tokens=TOOLS, **o),
        lambda x: torch.where(TOOLS, 0.0, ppo(x)) + 0.3 * k3(x),
        by_tokens(),
    ),
    "logits, exact KL": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.logits_policy_loss(x, TARGETS, c(OLD), c(ADV), MASK, ref_logits=c(TEACHER), **EXACT, **o),
        lambda x: ppo(scored(x)) + 0.3 * kl_of(x, TEACHER),
        by_tokens(),
    ),
    "logits, exact KL of sequences": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.logits_policy_loss(
            x,
            TARGETS,
            c(OLD),
            c(OF_ROW),
            MASK,
            ref_logits=c(TEACHER),
            ratio_level="sequence_sum",
            kl_coef=0.3,
            kl="reverse_kl",
            **o,
        ),
        lambda x: (
            FILLED * ppo(mean(scored(x)) * MASK.sum(-1), mean(OLD) * MASK.sum(-1), OF_ROW)
            + 0.3 * mean(kl_of(x, TEACHER, True))
        ),
        by_sequences(),
        (B,),
    ),
    "hidden states, exact KL": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_policy_loss(
            x, w, TARGETS, c(OLD), c(ADV), MASK, ref_hidden=c(REF_HIDDEN), ref_weight=c(REF_WEIGHT), **EXACT, **o
        ),
        of_head(lambda x: ppo(scored(x)) + 0.3 * kl_of(x, REF_HIDDEN @ REF_WEIGHT.T)),
        by_tokens(),
    ),
    "hidden states, gmpo": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_policy_loss(
            x, w, TARGETS, c(OLD), c(OF_ROW), MASK, objective="gmpo", ref_logprobs=c(REF), kl_coef=0.3, **o
        ),
        of_head(lambda x: gmpo(scored(x))),
        by_sequences(),
        (B,),
    ),
    "value": Case(
        (VALUES,),
        lambda c, x, **o: rlk.value_loss(x, None, c(RETURNS), MASK, **o),
        lambda x: 0.5 * (x - RETURNS) ** 2,
        by_tokens(),
    ),
    "value, clipped": Case(
        (VALUES,),
        lambda c, x, **o: rlk.value_loss(x, c(OLD_VALUES), c(RETURNS), MASK, clip_range=0.3, **o),
        clipped_error,
        by_tokens(),
    ),
    "log-probabilities, sft": Case(
        (LOGP,),
        lambda c, x, **o: rlk.logprobs_sft_loss(x, MASK, sample_weights=c(OF_ROW), **o),
        lambda x: -OF_ROW[:, None] * x,
        by_tokens(),
    ),
    "logits, sft": Case((LOGITS,), lambda c, x, **o: rlk.sft_loss(x, TARGETS, MASK, **o), sft_of_logits, by_tokens()),
    "logits, sft with more": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.sft_loss(
            x, TARGETS, MASK, sample_weights=c(OF_ROW), label_smoothing=0.2, z_loss_coef=0.1, **o
        ),
        lambda x: sft_of_logits(x, v=OF_ROW[:, None], smoothing=0.2, z=0.1),
        by_tokens(),
    ),
    "logits, dft": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.sft_loss(x, TARGETS, MASK, **SFT, **o),
        lambda x: sft_of_logits(x, "dft", z=0.1),
        by_tokens(),
    ),
    "hidden states, sft": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_sft_loss(x, w, TARGETS, MASK, **o),
        of_head(sft_of_logits),
        by_tokens(),
    ),
    "hidden states, dft": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_sft_loss(x, w, TARGETS, MASK, **SFT, **o),
        of_head(lambda x: sft_of_logits(x, "dft", z=0.1)),
        by_tokens(),
    ),
    "logits, asft": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.sft_loss(
            x, TARGETS, MASK, kind="asft", asft_alpha=0.3, ref_logits=c(TEACHER), sample_weights=c(OF_ROW), **o
        ),
        lambda x: sft_of_logits(x, "dft", OF_ROW[:, None]) + 0.3 * OF_ROW.abs()[:, None] * kl_of(x, TEACHER),
        by_tokens(),
    ),
    "hidden states, asft": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_sft_loss(
            x,
            w,
            TARGETS,
            MASK,
            kind="asft",
            ref_hidden=c(REF_HIDDEN),
            ref_weight=c(REF_WEIGHT),
            sample_weights=c(OF_ROW),
            z_loss_coef=0.1,
            **o,
        ),
        of_head(
            lambda x: (
                sft_of_logits(x, "dft", OF_ROW[:, None], z=0.1)
                + 0.1 * OF_ROW.abs()[:, None] * kl_of(x, REF_HIDDEN @ REF_WEIGHT.T)
            )
        ),
        by_tokens(),
    ),
    "divergence": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.divergence_loss(x, c(TEACHER), MASK, **o),
        lambda x: kl_of(x, TEACHER),
        by_tokens(),
    ),
    "hidden states, divergence": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_distillation_loss(
            x, w, c(REF_HIDDEN), c(REF_WEIGHT), MASK, kind="reverse_kl", chunk_tokens=4, **o
        ),
        of_head(lambda x: kl_of(x, REF_HIDDEN @ REF_WEIGHT.T, True)),
        by_tokens(),
    ),
    "steps": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.process_reward_loss(x, STEPS, reward_token_ids=[4, 2, 1], **o),
        lambda x: -x[..., [4, 2, 1]].log_softmax(-1)[..., 1],
        by_tokens(),
    ),
    "soft steps": Case(
        (LOGITS,),
        lambda c, x, **o: rlk.process_reward_loss(x, c(SOFT), reward_token_ids=[1, 4], **o),
        soft_steps,
        by_tokens(),
    ),
    "pairs of a reward model": Case(
        (RHO[0], RHO[1]),
        lambda c, x, y, **o: rlk.pairwise_reward_loss(x, y, **o),
        lambda x, y: -torch.nn.functional.logsigmoid(x - y),
        EVEN,
        (6,),
    ),
    "spans": Case(
        (drawn(4, 4),),
        lambda c, x, **o: rlk.span_reward_loss(x, IDS, 0, **o)[0],
        spans,
        [({}, torch.tensor([0.5, 0.5]))],
        (2,),
    ),
    "ranked lists": Case(
        (drawn(6),),
        lambda c, x, **o: rlk.rank_list_loss(x, [3, 1, 2], **o),
        ranked,
        [({}, torch.tensor([3.0, 0.0, 1.0]) / 4), ({"aggregation": "list-mean"}, torch.tensor([0.5, 0.0, 0.5]))],
        (3,),
    ),
    "pairs": Case(
        (RHO[0], RHO[1]), lambda c, x, y, **o: rlk.dpo_loss(x, y, reference_free=True, **o), dpo_of, EVEN, (6,)
    ),
    "hidden states, pairs": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_dpo_loss(x, w, TARGETS, MASK, reference_free=True, **o),
        lambda x, w: dpo_of(answers(x, w)[:2], answers(x, w)[2:]),
        [({}, torch.tensor([0.5, 0.5])), ({"reduction": "sum"}, torch.ones(2))],
        (2,),
    ),
    "answers": Case(
        (RHO[0],),
        lambda c, x, **o: rlk.unpaired_preference_loss(x, c(RHO[1]), GOOD, kl=0.1, **KTO, **o),
        kto,
        EVEN,
        (6,),
    ),
    "answers, one of the batch": Case(
        (RHO[0],),
        lambda c, x, **o: rlk.unpaired_preference_loss(x, c(RHO[1]), GOOD, loss_type="kto_paired_batch", **KTO, **o),
        kto_of_batch,
        EVEN,
        (6,),
    ),
    "hidden states, answers": Case(
        (HIDDEN, WEIGHT),
        lambda c, x, w, **o: rlk.linear_unpaired_preference_loss(
            x, w, TARGETS, c(OF_ROW), PAIR, MASK, loss_type="bco", delta=0.2, beta=0.5, **o
        ),
        lambda x, w: (
            -torch.nn.functional.logsigmoid(torch.where(PAIR, 1.0, -1.0) * (0.5 * (answers(x, w) - OF_ROW) - 0.2))
        ),
        BY_ANSWER,
        (4,),
    ),
}
TOLERANCES = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 3e-5, "atol": 3e-6}}


def called(case, dtype, **options):
    """Returns the loss, and the leaves that it has a gradient in; NaN stands at the rows of dead tokens."""
    dead = ~MASK if case.dead is None else case.dead
    leaves = []
    for x in case.leaves:
        x = x.to(dtype).clone()
        if x.shape[:2] == (B, L):
            x = torch.where(dead.view(B, L, *(1,) * (x.dim() - 2)), torch.nan, x)
        leaves.append(x.requires_grad_())

    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x

    return case.call(cast, *leaves, **options), leaves


def truth_of(case):
    leaves = [x.clone().requires_grad_() for x in case.leaves]
    each = case.truth(*leaves)
    dead = ~MASK if case.dead is None else case.dead
    return (torch.where(dead, 0.0, each) if case.shape == (B, L) else each), leaves
