"""reward_scores with several labels and of every token, and end_scores, against indexing by hand."""

import math

import pytest
import torch
from reference import same_bits

import rlkernels as rlk

NAN, INF = math.nan, math.inf
B, L, H = 4, 5, 6


def problem(dtype=torch.float64, labels=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden, head, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        for shape in ((B, L, H), (labels, H), (labels,))
    )
    mask = torch.rand(B, L, generator=draw) < 0.6
    mask[2] = False
    return hidden, head, bias, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("positions", ["end", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_and_gradients_are_those_of_a_linear_layer(dtype, positions, labels, masked):
    *inputs, mask = problem(dtype, labels)
    inputs = [x.requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    mask = mask if masked else None
    got = rlk.reward_scores(*inputs[:2], attention_mask=mask, bias=inputs[2], positions=positions)
    every = wide[0] @ wide[1].T + wide[2]
    if positions == "all":
        want = every if mask is None else torch.where(mask[..., None], every, 0.0)
    else:
        ends = [max([t for t in range(L) if mask is not None and mask[i, t]], default=L - 1) for i in range(B)]
        want = every[torch.arange(B), ends]
    want = want[..., 0] if labels == 1 else want
    coarse = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2}[dtype]
    assert got.shape == want.shape and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=min(coarse, 5e-6), atol=min(coarse, 5e-6))
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream.to(got.dtype)), torch.autograd.grad(want, wide, upstream), strict=True
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=coarse, atol=2 * coarse)


@pytest.mark.parametrize("garbage", [NAN, INF])
@pytest.mark.parametrize("labels", [1, 3])
def test_the_row_of_a_dead_token_is_not_read(labels, garbage):
    hidden, head, bias, mask = problem(torch.float32, labels)
    results = []
    for poison in (0.5, garbage):
        h, w = hidden.masked_fill(~mask[..., None], poison).requires_grad_(), head.clone().requires_grad_()
        scores = rlk.reward_scores(h, w, attention_mask=mask.int(), bias=bias, positions="all")
        gradients = torch.autograd.grad(scores.sum(), (h, w))
        results.append((scores.detach(), *gradients))
        assert not scores[~mask].any() and not gradients[0][~mask].any()
    assert all(same_bits(a, b) and b.isfinite().all() for a, b in zip(*results, strict=True))


def test_the_score_of_a_token_does_not_depend_on_its_company():
    hidden, head, _, mask = problem(torch.float32, 3)
    every = rlk.reward_scores(hidden, head, positions="all")
    live = rlk.reward_scores(hidden, head, attention_mask=mask, positions="all")
    assert same_bits(live[mask], every[mask])
    for i in range(B):
        assert same_bits(rlk.reward_scores(hidden[i], head, positions="all"), every[i])
    assert same_bits(rlk.reward_scores(hidden, head), every[:, -1])


def test_no_token_and_no_live_token_give_zeros_with_a_gradient():
    for shape, mask in (((0, L, H), None), ((B, 0, H), None), ((B, L, H), torch.zeros(B, L)), ((0, H), None)):
        hidden, head = torch.full(shape, NAN).requires_grad_(), torch.ones(2, H, requires_grad=True)
        scores = rlk.reward_scores(hidden, head, attention_mask=mask, positions="all")
        assert scores.shape == (*shape[:-1], 2) and not scores.any()
        for gradient, x in zip(torch.autograd.grad(scores.sum(), (hidden, head)), (hidden, head), strict=True):
            assert gradient.shape == x.shape and not gradient.any()


def test_a_process_reward_model_from_hidden_states_reads_the_ends_of_steps_alone():
    """The head's two rows for the reward tokens, at the live steps, are all that the loss needs of the model."""
    hidden, head, _, steps = problem(torch.float64, 9)
    labels = torch.rand(B, L, dtype=torch.float64)
    logits = hidden @ head.T
    whole = rlk.process_reward_loss(logits, labels, mask=steps, reward_token_ids=(7, 2))
    poisoned = hidden.masked_fill(~steps[..., None], NAN)
    two = rlk.reward_scores(poisoned, head[[7, 2]], attention_mask=steps, positions="all")
    torch.testing.assert_close(
        rlk.process_reward_loss(two, labels, mask=steps, reward_token_ids=(0, 1)), whole, rtol=1e-12, atol=0
    )


def test_end_scores_select_what_a_mask_ids_or_offsets_say():
    values = torch.arange(15.0, dtype=torch.float64).view(3, 5).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]])
    ids = torch.tensor([[0, 0, 7, 0, 7], [7, 7, 7, 7, 7], [7, 0, 7, 7, 0]], dtype=torch.int32)
    for ends, (scores, found) in (
        ((2, 4, 3), rlk.end_scores(values, mask)),
        ((4, 4, 4), rlk.end_scores(values)),
        ((2, 4, 3), rlk.end_scores(values, input_ids=ids, pad_id=0, prompt_length=2)),
        ((0, 4, 0), rlk.end_scores(values, input_ids=ids, pad_id=0)),
    ):
        assert found.tolist() == list(ends)
        assert torch.equal(scores, values[torch.arange(3), list(ends)])
        (gradient,) = torch.autograd.grad(scores.sum(), values)
        assert gradient.sum() == 3 and (gradient[torch.arange(3), list(ends)] == 1).all()
    scores, found = rlk.end_scores(values.detach().view(-1).bfloat16(), cu_seqlens=[0, 3, 4, 15])
    assert found.tolist() == [2, 3, 14] and scores.tolist() == [2.0, 3.0, 14.0] and scores.dtype == torch.float32
    with pytest.raises(ValueError, match="^end_scores: cu_seqlens makes sequence 1 empty"):
        rlk.end_scores(values.detach().view(-1), cu_seqlens=[0, 3, 3, 15])
    assert rlk.end_scores(torch.zeros(0, 4))[0].shape == (0,)


V, IDS = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.int64)
HIDDEN, HEAD = torch.zeros(2, 3, 4), torch.zeros(1, 4)
ENDS, SCORES = rlk.end_scores, rlk.reward_scores
BAD = {
    "two sources": (
        ENDS,
        ValueError,
        "attention_mask and input_ids each say",
        (V, IDS),
        {"input_ids": IDS, "pad_id": 1},
    ),
    "ids without pad": (ENDS, ValueError, "input_ids needs pad_id", (V,), {"input_ids": IDS}),
    "pad without ids": (ENDS, ValueError, "pad_id needs input_ids", (V,), {"pad_id": 0}),
    "prompt": (ENDS, ValueError, "prompt_length must be at least 1, got 0", (V,), {"prompt_length": 0}),
    "no token": (ENDS, ValueError, "sequences without a token", (V[:, :0],), {}),
    "no token, by ids": (
        ENDS,
        ValueError,
        "sequences without a token",
        (V[:, :0],),
        {"input_ids": IDS[:, :0], "pad_id": 0},
    ),
    "packed": (ENDS, ValueError, r"values has shape \(2, 3\), expected \[N\]", (V,), {"cu_seqlens": [0, 6]}),
    "ids of another shape": (ENDS, ValueError, r"input_ids has shape", (V,), {"input_ids": IDS.T, "pad_id": 0}),
    "values": (ENDS, TypeError, "values has dtype torch.int64", (IDS,), {}),
    "positions": (SCORES, ValueError, "positions must be one of end, all", (HIDDEN, HEAD), {"positions": "last"}),
    "offsets of all": (
        SCORES,
        ValueError,
        'cu_seqlens says where sequences end, and positions="all"',
        (HIDDEN[0], HEAD),
        {"positions": "all", "cu_seqlens": [0, 3]},
    ),
    "one row": (SCORES, ValueError, r"expected \[..., H\]", (HIDDEN[0, 0], HEAD), {"positions": "all"}),
    "no label": (SCORES, ValueError, r"weight has shape \(0, 4\), expected \(1, 4\)", (HIDDEN, HEAD[:0]), {}),
    "bias of labels": (
        SCORES,
        ValueError,
        r"bias has shape \(1,\), expected \(2,\)",
        (HIDDEN, torch.zeros(2, 4)),
        {"bias": torch.zeros(1)},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_heads_refuse_what_they_would_guess(case):
    function, error, message, arguments, options = BAD[case]
    with pytest.raises(error, match=f"^{function.__name__}: .*{message}"):
        function(*arguments, **options)
