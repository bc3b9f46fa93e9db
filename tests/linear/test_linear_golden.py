"""Golden cases of other systems through the head: two columns give each token the log-probability that the file says,
an identity the logits.
"""

import types

import golden_ops
import golden_preferences
import pytest
import torch
from golden_adapter import check_gradients, check_outputs
from golden_coverage import COVERED

import rlkernels as rlk


def head_of(logp, live):
    """Hidden states, weight and targets under which a token's log-probability is ``logp``: logits ``log p`` and ``log
    (1 - p)``, of sum 1.
    """
    logp = torch.where(live, logp, -1.0)
    other = torch.where(logp > -0.69, (-logp.expm1()).log(), (-logp.exp()).log1p())
    return torch.stack([logp, other], -1), torch.eye(2, dtype=logp.dtype), torch.zeros(logp.shape, dtype=torch.int64)


def policy_loss(logp, old, advantages, mask=None, **options):
    live = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask != 0
    return rlk.linear_policy_loss(*head_of(logp, live), old, advantages, mask, chunk_tokens=3, **options)


def logprobs_sft_loss(logp, mask=None, **options):
    return rlk.linear_sft_loss(*head_of(logp, mask != 0), mask, chunk_tokens=3, **options)


def sft_loss(logits, targets, *, ref_logits=None, **options):
    columns = torch.eye(logits.shape[-1], dtype=logits.dtype)
    if ref_logits is not None:
        options |= {"ref_hidden": ref_logits, "ref_weight": columns}
    return rlk.linear_sft_loss(logits, columns, targets, chunk_tokens=3, **options)


def token_stats(logits, targets, *, vocab_mask=None, **options):
    return rlk.linear_token_stats(logits, torch.eye(logits.shape[-1], dtype=logits.dtype), targets, **options)


def answers(sums):
    """Two tokens an answer, of three quarters and one quarter of its log-probability."""
    logp = torch.stack([0.75 * sums, 0.25 * sums], -1)
    return head_of(logp, torch.ones_like(logp, dtype=torch.bool))


def dpo_loss(chosen, rejected, ref_chosen=None, ref_rejected=None, **options):
    both = answers(torch.cat([chosen, rejected]))
    return rlk.linear_dpo_loss(
        *both, ref_chosen_logps=ref_chosen, ref_rejected_logps=ref_rejected, chunk_tokens=5, **options
    )


def unpaired_preference_loss(logps, refs, desirable, **options):
    return rlk.linear_unpaired_preference_loss(*answers(logps), refs, desirable, chunk_tokens=3, **options)


THROUGH = types.SimpleNamespace(
    **{
        **vars(rlk),
        **{
            f.__name__: f
            for f in (policy_loss, logprobs_sft_loss, sft_loss, token_stats, dpo_loss, unpaired_preference_loss)
        },
    }
)
OPS = (
    "policy_loss",
    "nll_from_logp",
    "weighted_nll",
    "sft_loss",
    "token_logprob",
    "preference_loss",
    "preference_loss_from_tokens",
    "unpaired_preference_loss",
)


def expressible(case):
    """Tells whether a head can stand for what the file gives: log-probabilities below 0, no entropy beside them, no
    columns taken out of the logits.
    """
    x = case.tensors(torch.float64)
    if (
        case.op not in OPS
        or "entropy" in x
        or "vocab_mask" in x
        or "logits" in x
        and x["logits"].dim() < 2
        or case.expected.get("raises_or_nan")
    ):
        return False
    if "logits" in x:
        return bool(x["logits"].isfinite().all())
    given = [x[name] for name in ("policy_chosen", "policy_rejected") if name in x]
    for name, mask in (
        ("logp", x.get("mask")),
        ("per_token_logp", x["completion_mask"][:, 1:] if "completion_mask" in x else None),
    ):
        if name in x:
            given += [x[name] if mask is None else torch.where(mask != 0, x[name], -1.0)]
    return (
        bool(given) and all(bool((t < 0).all() and t.isfinite().all()) for t in given) and case.dtype != torch.bfloat16
    )


CASES = [case for case in COVERED if expressible(case)]
# It sorts log-ratios, two of which are equal but for the last bits of float32.
TIED = "dpo.trl.aot_unpaired"


def test_enough_of_the_golden_cases_can_be_told_by_a_head():
    found = {op: sum(case.op == op for case in CASES) for op in OPS}
    assert found["policy_loss"] >= 20 and found["preference_loss"] >= 10 and all(found.values()), found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_golden_case_through_the_head(case, dtype, monkeypatch, backend):
    if case.id == TIED and dtype == torch.float32:
        pytest.skip("which of two equal log-ratios comes first is a matter of rounding")
    monkeypatch.setattr(golden_ops, "rlk", THROUGH)
    monkeypatch.setattr(golden_preferences, "rlk", THROUGH)
    inputs = case.tensors(dtype)
    outputs = golden_ops.run(case, inputs)
    check_outputs(case, outputs, dtype)
    check_gradients(case, inputs, outputs, dtype)
