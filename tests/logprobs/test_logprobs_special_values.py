"""Faults that concern special values in rows of logits: infinities, NaN, and columns that a model
excludes.
"""

import math

import pytest
import torch
from reference import assert_within_policy, draw_rows, judge, statistics
from row_runs import DTYPES, SIXTEEN, assert_same_bits, run

import rlkernels as rlk

INF, NAN = math.inf, math.nan

# The table of FAULTS 9.3. Neighbours of a special row stay as they are, in every bit.
SPECIAL = {
    "some -inf": (lambda x: x.index_fill(0, torch.tensor([0, 5, 36]), -INF), "finite"),
    "-inf at the target": (lambda x: x.index_fill(0, torch.tensor([7]), -INF), "-inf"),
    "only the target finite": (lambda x: torch.full_like(x, -INF).index_fill(0, torch.tensor([7]), 2.0), "certain"),
    "top-3 replay": (
        lambda x: torch.full_like(x, -INF).index_copy(
            0, torch.tensor([7, 20, 30]), torch.tensor([0.5, 1.5, -1.0], dtype=x.dtype)
        ),
        "finite",
    ),
    "all -inf": (lambda x: torch.full_like(x, -INF), "nan"),
    "a NaN": (lambda x: x.index_fill(0, torch.tensor([3]), NAN), "nan"),
    "NaN at the target": (lambda x: x.index_fill(0, torch.tensor([7]), NAN), "nan"),
    "+inf": (lambda x: x.index_fill(0, torch.tensor([3]), INF), "nan"),
    "+inf at the target": (lambda x: x.index_fill(0, torch.tensor([7]), INF), "nan"),
    "a NaN behind -inf": (lambda x: torch.full_like(x, -INF).index_fill(0, torch.tensor([36]), NAN), "nan"),
}


@pytest.mark.fault(16)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole vocabulary", "vocab_mask"])
@pytest.mark.parametrize("case", SPECIAL)
def test_special_values_follow_the_table_and_leave_the_neighbours_alone(case, masked, dtype, backend):
    make, outcome = SPECIAL[case]
    x, targets, _ = draw_rows((3,), 37, dtype)
    targets[:] = torch.tensor([1, 7, 2])
    options = {"vocab_mask": torch.arange(37) != 11} if masked else {}
    clean = run(x, targets, **options)
    x[1] = make(x[1])
    got = run(x, targets, **options)
    for row in (0, 2):
        assert_same_bits({k: v[row] for k, v in got.items()}, {k: v[row] for k, v in clean.items()})
    logp, entropy, gradient = got["logprobs"][1], got["entropy"][1], got["gradient"][1]
    if outcome == "nan":
        assert logp.isnan() and entropy.isnan() and not got["is_top1"][1]
        assert (gradient.isnan() | (torch.arange(37) == 11 if masked else False)).all()
        assert not masked or gradient[11] == 0
        return
    assert entropy.isfinite() and gradient.isfinite().all()
    if outcome == "-inf":
        assert logp == -INF
    if outcome == "certain":
        assert logp == 0 and entropy == 0 and not gradient.any()
    judge(rlk.token_stats, x, targets, 0.7, **options)
    absent_columns = x[1] == -INF
    absent_columns[7] = False
    assert not gradient[absent_columns].any()


@pytest.mark.fault(16)
def test_a_target_outside_the_support_has_logprob_minus_infinity_and_moves_nothing(backend):
    x, targets, _ = draw_rows((3,), 37)
    targets[:] = 7
    got = run(x, targets, vocab_mask=torch.arange(37) != 7, g=(torch.tensor([1.3, 0.0, -0.2]), torch.zeros(3)))
    assert (
        (got["logprobs"] == -INF).all()
        and got["entropy"].isfinite().all()
        and not got["gradient"].any()
        and not got["is_top1"].any()
    )
    entropy_alone = run(
        x, targets, vocab_mask=torch.arange(37) != 7, g=(torch.zeros(3), torch.tensor([1.3, 0.4, -0.2]))
    )["gradient"]
    wide = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(
        statistics(wide, targets, vocab_mask=torch.arange(37) != 7)["entropy"],
        wide,
        torch.tensor([1.3, 0.4, -0.2]).double(),
    )
    torch.testing.assert_close(entropy_alone.double(), truth, atol=5e-7, rtol=4e-6)


@pytest.mark.fault(16)
def test_kl_where_one_model_excludes_a_column(backend):
    x, targets, _ = draw_rows((3,), 37)
    reference = draw_rows((3,), 37, seed=9)[0]
    targets[:] = 7
    x[0, 5], reference[1, 5] = -INF, -INF
    x[2, 5] = reference[2, 5] = -INF
    got = rlk.token_stats(x, targets, ref_logits=reference, kl="exact").kl
    truth = statistics(x, targets, ref_logits=reference)["kl"]
    assert truth[0].isfinite() and truth[1] == INF and truth[2].isfinite()
    assert_within_policy(got, truth, statistics(x, targets, ref_logits=reference, dtype=torch.float32)["kl"], "kl")
    finite = torch.tensor([0, 2])
    judge(rlk.token_stats, x[finite], targets[finite], ref_logits=reference[finite])


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    "leading,dtype",
    [(n, torch.float32) for n in (1, 64, 4096, 5000, 8192, 9000)] + [(4096, dtype) for dtype in SIXTEEN],
)
def test_leading_blocks_of_minus_infinity_change_nothing(leading, dtype, backend):
    x, targets, _ = draw_rows((4,), 9001, dtype)
    targets[:] = torch.tensor([9000, 9000, -100, 9000])
    short, short_targets = x[:, leading:].clone(), torch.where(targets == -100, -100, targets - leading)
    x[:, :leading] = -INF
    for hidden in ({}, {"vocab_mask": torch.arange(9001) >= leading}):
        got = run(x, targets, **hidden)
        expected = statistics(short, short_targets)
        base = statistics(short.float(), short_targets, dtype=torch.float32)
        for name in ("logprobs", "logsumexp", "entropy", "log_sum_sq_probs"):
            assert_within_policy(got[name], expected[name], base[name], name)
        assert not got["gradient"][:, :leading].any() and got["gradient"].isfinite().all()
    judge(rlk.token_stats, x, targets)
