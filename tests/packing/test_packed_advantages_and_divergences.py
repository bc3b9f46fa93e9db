"""The layouts of a packed batch, ``[1, T]`` and with padding at the end, in advantages and in distillation."""

import pytest
import torch

import rlkernels as rlk

T, END, CU = 8, 6, [0, 2, 6]
draw = torch.Generator().manual_seed(2)
X, Y, Z = (torch.randn(T, generator=draw, dtype=torch.float64) for _ in range(3))
A, B = (torch.randn(T, 5, generator=draw, dtype=torch.float64) for _ in range(2))
TOP = B.log_softmax(-1).topk(2)
W, V = (torch.randn(5, 5, generator=draw, dtype=torch.float64) for _ in range(2))
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0])
IDS = torch.tensor([7, 7])
CALLS = {
    "vtrace": lambda of, mask, cu: rlk.vtrace(of(X), of(Y), of(Z), of(-Z), mask, cu_seqlens=cu)[0],
    "step_advantages": lambda of, mask, cu: rlk.step_advantages(of(X), of(MASK), IDS, mask, cu_seqlens=cu),
    "optimal_token_advantages": lambda of, mask, cu: rlk.optimal_token_advantages(
        of(X), of(-Y.abs()), of(-Z.abs()), IDS, mask, cu_seqlens=cu
    )[0],
    "wpo_weights": lambda of, mask, cu: rlk.wpo_weights(of(-X.abs()), mask, cu_seqlens=cu),
    "divergence_loss": lambda of, mask, cu: rlk.divergence_loss(of(A), of(B), mask, cu_seqlens=cu),
    "divergence_loss of top log-probabilities": lambda of, mask, cu: rlk.divergence_loss(
        of(A), mask=mask, teacher_topk=(of(TOP.indices), of(TOP.values)), cu_seqlens=cu
    ),
    "linear_distillation_loss": lambda of, mask, cu: rlk.linear_distillation_loss(
        of(A), W, of(B), V, mask, cu_seqlens=cu
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_row_and_padding_at_the_end_change_no_number(name):
    want = CALLS[name](lambda x: x[:END], MASK[:END], CU)
    assert want.abs().sum() > 0
    row = CALLS[name](lambda x: x[None, :END], MASK[None, :END], CU)
    assert row.dim() == (2 if want.shape == (END,) else want.dim())
    padded = CALLS[name](lambda x: x, MASK, CU)
    for got in (row.squeeze(0) if row.dim() == 2 else row, padded[:END] if padded.shape == (T,) else padded):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("placement", ("last-action", "trl-end", "token-level"))
def test_rewards_of_one_row_are_those_of_packed_tokens(placement):
    scores = X[:END] if placement == "token-level" else X[:2]
    want = rlk.assemble_rewards(scores, MASK[:END], placement=placement, cu_seqlens=CU)
    scores = scores[None] if placement == "token-level" else scores
    got = rlk.assemble_rewards(scores, MASK[None, :END], placement=placement, cu_seqlens=CU)
    assert torch.equal(got, want[None])
    assert torch.equal(rlk.extended_mask(MASK[None, :END], CU), rlk.extended_mask(MASK[:END], CU)[None])
