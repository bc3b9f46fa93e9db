"""``aggregate`` under a mask that weighs: a token of weight 2 is a token that stands there twice."""

import pytest
import torch

import rlkernels as rlk
from rlkernels.aggregation import AGGREGATIONS

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
TIMES = torch.tensor([[2, 1, 7, 0], [3, 3, 3, 3], [1, 2, 3, 9]])
GROUPS = torch.tensor([5, 5, 2])
OPTIONS = {
    "seq-mean-token-sum-norm": {"horizon": 5},
    "fixed-horizon": {"horizon": 5},
    "global-token-mean": {"batch_num_tokens": 13},
    "prompt-mean": {"group_ids": GROUPS},
    "rollout-mean": {"rollout_ids": GROUPS},
    "group-mean": {"group_ids": GROUPS},
}


def values():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(MASK.shape, dtype=torch.float64, generator=g)
    return torch.where(MASK, x, float("nan")).requires_grad_()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_weight_counts_a_token_as_often_as_it_says(mode, packed):
    x, options, length = values(), OPTIONS.get(mode, {}), 9
    times = torch.where(MASK, TIMES, 0)
    rows = [torch.repeat_interleave(x[i], times[i]) for i in range(3)]
    repeated = torch.stack([torch.cat([row, row.new_zeros(length - len(row))]) for row in rows])
    live = torch.arange(length) < times.sum(-1, keepdim=True)
    want = rlk.aggregate(repeated, live, mode, **options)
    (gradient,) = torch.autograd.grad(want, x)
    given, mask, weights = (y.view(-1) if packed else y for y in (x, MASK, TIMES.double()))
    cu_seqlens = torch.tensor([0, 4, 8, 12]) if packed else None
    got = rlk.aggregate(given, mask, mode, weights=weights, cu_seqlens=cu_seqlens, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], gradient, rtol=1e-12, atol=0)


def test_weights_that_are_all_zero_or_dead_give_zero_with_a_gradient_of_zero():
    x = values()
    for mode in ("token-mean", "seq-mean-token-mean", "token-sum"):
        loss = rlk.aggregate(x, MASK, mode, weights=torch.zeros(MASK.shape))
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
        junk = torch.where(MASK, 1.0, float("nan"))
        assert rlk.aggregate(x, MASK, mode, weights=junk) == rlk.aggregate(x, MASK, mode)


def test_bad_weights_are_named():
    x, ones = values(), torch.ones(MASK.shape)
    for bad, error, message in (
        (-ones, ValueError, "weights holds -1.0, expected finite numbers from 0 on"),
        (ones * float("inf"), ValueError, "weights holds inf"),
        (ones[0], ValueError, r"weights has shape \(4,\), expected \(3, 4\)"),
        (ones.long(), TypeError, "weights has dtype torch.int64"),
        (ones.clone().requires_grad_(), ValueError, "weights gets no gradient; detach it"),
    ):
        with pytest.raises(error, match=f"^aggregate: {message}"):
            rlk.aggregate(x, MASK, weights=bad)
