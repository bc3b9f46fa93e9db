"""Packed batches whose offsets end before their tokens do: the mask is 0 behind, and nothing of it reaches a result."""

import pytest
import torch
from padded_calls import CALLS, CU, END, LOGP, MASK, OLD, PER_SEQUENCE, REWARDS, VALUES, T

import rlkernels as rlk
from rlkernels.checks import tokens as checks_tokens


def assert_as_without_padding(got, name):
    expected = CALLS[name](END, MASK[:END], torch.tensor(CU))
    if got.shape[-1:] == (T,):
        assert (got[..., END:] == 0).all()
        got = got[..., :END]
    assert expected.double().abs().sum() > 0
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_padding_behind_the_last_sequence_changes_nothing(name, backend):
    for cu in (torch.tensor(CU), torch.tensor(CU, dtype=torch.int32), list(CU)):
        before = torch.as_tensor(cu).clone()
        assert_as_without_padding(CALLS[name](T, MASK, cu), name)
        assert torch.equal(torch.as_tensor(cu), before)


@pytest.mark.parametrize("name", CALLS)
def test_where_values_are_not_read_the_mask_is_taken_at_its_word(name, monkeypatch):
    monkeypatch.setattr(checks_tokens, "values_are_read", lambda cu: False)
    with rlk.use_backend("eager"):
        assert_as_without_padding(CALLS[name](T, MASK, torch.tensor(CU)), name)


@pytest.mark.parametrize("name", CALLS)
def test_a_live_token_behind_the_end_is_refused(name):
    function = name.split(",")[0].split(" ")[0]
    live = MASK.clone()
    live[-1] = 1
    with pytest.raises(ValueError, match=f"^{function}: cu_seqlens ends at 7, .* or a mask that is 0 behind its end"):
        CALLS[name](T, live, torch.tensor(CU))


@pytest.mark.parametrize("name", ["gae", "sft_loss"])
def test_in_a_compiled_program_padding_is_the_same(name):
    torch._dynamo.reset()
    run = torch.compile(lambda m, cu: CALLS[name](T, m, cu), backend="aot_eager", fullgraph=True)
    assert_as_without_padding(run(MASK, torch.tensor(CU)), name)
    with pytest.raises(ValueError, match="cu_seqlens ends at 7"):
        run(torch.ones_like(MASK), torch.tensor(CU))


def test_a_gradient_does_not_reach_the_padding():
    logp = LOGP.clone().requires_grad_()
    rlk.policy_loss(logp, OLD, PER_SEQUENCE, MASK, ratio_level="sequence", cu_seqlens=CU).backward()
    assert (logp.grad[END:] == 0).all() and logp.grad[:END].isfinite().all() and logp.grad.abs().sum() > 0


def test_padding_needs_a_sequence_and_a_mask_that_counts():
    with pytest.raises(ValueError, match="cu_seqlens ends at 0"):
        rlk.sequence_sums(LOGP, torch.zeros(T), torch.tensor([0]))
    with pytest.raises(ValueError, match="cu_seqlens ends at 7"):
        rlk.gae(REWARDS, VALUES, MASK, masked="none", cu_seqlens=CU)
    with pytest.raises(ValueError, match="cu_seqlens decreases from 8 to 7"):
        rlk.sequence_sums(LOGP, MASK, torch.tensor([0, 8, 7]))
