"""What aggregations refuse: names, normalisers, masks, groups and offsets."""

import pytest
import torch

from rlkernels.aggregation import aggregate, token_weights

MASK = torch.ones(5, 8, dtype=torch.bool)
GROUPS = torch.tensor([7, -3, 7, 7, -3])
LOSS = torch.zeros(5, 8)

BAD = {
    "B37 unknown aggregation": (
        ValueError,
        r"^token_weights: mode must be one of .*token-mean.*got 'tokenmean'",
        (MASK, "tokenmean"),
        {},
    ),
    "B38 horizon missing": (
        ValueError,
        "^token_weights: aggregation 'fixed-horizon' needs horizon",
        (MASK, "fixed-horizon"),
        {},
    ),
    "B38 packed has no L": (
        ValueError,
        "aggregation 'seq-mean-token-sum-norm' needs horizon",
        (MASK[0], "seq-mean-token-sum-norm"),
        {"cu_seqlens": torch.tensor([0, 8])},
    ),
    "B38 total missing": (
        ValueError,
        "aggregation 'global-token-mean' needs batch_num_tokens",
        (MASK, "global-token-mean"),
        {},
    ),
    "B38 groups missing": (ValueError, "aggregation 'prompt-mean' needs group_ids", (MASK, "prompt-mean"), {}),
    "B38 rows unknown": (
        ValueError,
        "aggregation 'seq-mean-token-mean' needs cu_seqlens",
        (MASK[0], "seq-mean-token-mean"),
        {},
    ),
    "an unused normaliser": (
        ValueError,
        "aggregation 'token-sum' takes no horizon",
        (MASK, "token-sum"),
        {"horizon": 4},
    ),
    "a negative normaliser": (
        ValueError,
        "batch_num_tokens must be finite and not negative, got -1",
        (MASK,),
        {"batch_num_tokens": -1},
    ),
    "a NaN scale": (ValueError, "scale must be finite and not negative, got nan", (MASK,), {"scale": float("nan")}),
    "a normaliser per row": (
        ValueError,
        r"batch_num_tokens has shape \(5,\), expected "
        r"\(\)",
        (MASK,),
        {"batch_num_tokens": torch.ones(5)},
    ),
    "B16 complex mask": (
        TypeError,
        "mask must be bool, integer or floating, got torch.complex64",
        (MASK.to(torch.complex64),),
        {},
    ),
    "B51 float groups": (
        TypeError,
        "group_ids must be an integer tensor, got torch.float32",
        (MASK, "prompt-mean"),
        {"group_ids": GROUPS.float()},
    ),
    "B51 groups per token": (
        ValueError,
        r"group_ids has shape \(5, 8\), expected \(5,\)",
        (MASK, "prompt-mean"),
        {"group_ids": torch.zeros(5, 8, dtype=torch.int64)},
    ),
    "F125 tokens of groups per token": (
        ValueError,
        r"group_tokens has shape \(5, 8\), expected \(5,\)",
        (MASK, "prompt-mean"),
        {"group_ids": GROUPS, "group_tokens": torch.zeros(5, 8, dtype=torch.int64)},
    ),
    "F125 rows where tokens are divided by": (
        ValueError,
        "aggregation 'prompt-mean' takes no group_rows; its normalisers are: .*group_tokens",
        (MASK, "prompt-mean"),
        {"group_ids": GROUPS, "group_rows": GROUPS},
    ),
    "B40 float offsets": (
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor, got torch.float32",
        (MASK[0],),
        {"cu_seqlens": torch.tensor([0.0, 8.0])},
    ),
    "B40 a list of numbers": (
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor, or a list of ints; got a list that holds a float",
        (MASK[0],),
        {"cu_seqlens": [0, 8.0]},
    ),
    "B40 two dimensions": (
        ValueError,
        r"cu_seqlens has shape \(1, "
        r"2\)",
        (MASK[0],),
        {"cu_seqlens": torch.tensor([[0, 8]])},
    ),
    "B40 first not 0": (ValueError, "cu_seqlens starts at 1", (MASK[0],), {"cu_seqlens": torch.tensor([1, 8])}),
    "B40 last not T": (
        ValueError,
        "cu_seqlens ends at 7, expected the number of tokens, 8",
        (MASK[0],),
        {"cu_seqlens": torch.tensor([0, 7])},
    ),
    "B40 decreasing": (
        ValueError,
        "cu_seqlens decreases from 5 to 3 at entry 2",
        (MASK[0],),
        {"cu_seqlens": torch.tensor([0, 5, 3, 8])},
    ),
    "B40 with rows": (
        ValueError,
        r"mask has shape \(5, 8\), expected "
        r"\[N\]",
        (MASK,),
        {"cu_seqlens": torch.tensor([0, 8])},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, arguments, options = BAD[case]
    with pytest.raises(error, match=message):
        token_weights(*arguments, **options)


def test_B15_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^aggregate: mask has shape \(5,\), expected \(5, 8\)"):
        aggregate(LOSS, MASK[:, 0])
    with pytest.raises(ValueError, match=r"^aggregate: mask has shape \(5, 1\), expected \(5,\)"):
        aggregate(LOSS[:, 0], MASK[:, :1])
