"""Faults of packed batches: F127 and F137, offsets that do not cover the tokens, empty sequences, and numbers that
could be per token or per sequence.
"""

import re

import pytest
import torch
from packed_calls import BAD, CALLS, GOOD, HIDDEN, LOGITS, OLD, TARGETS, WEIGHT, Z

import rlkernels as rlk
from rlkernels import sequences
from rlkernels.checks import tokens as checks_tokens

# F127 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(127)
@pytest.mark.parametrize("name", CALLS)
def test_every_function_refuses_offsets_that_do_not_cover_the_tokens(name, backend):
    function = re.match(r"\w+", name).group()
    for bad in BAD.values():
        for cu in (torch.tensor(bad), torch.tensor(bad, dtype=torch.int32), list(bad)):
            with pytest.raises(ValueError, match=f"^{function}: cu_seqlens"):
                CALLS[name](cu)


KINDS = {
    "floats": (
        TypeError,
        torch.tensor(GOOD, dtype=torch.float32),
        "must be an int32 or int64 tensor, got torch.float32",
    ),
    "bools": (
        TypeError,
        torch.tensor([False, True, True, True, True]),
        "must be an int32 or int64 tensor, got torch.bool",
    ),
    "16 bits": (TypeError, torch.tensor(GOOD, dtype=torch.int16), "must be an int32 or int64 tensor, got torch.int16"),
    "two dimensions": (ValueError, torch.tensor([GOOD]), r"has shape \(1, 5\), expected \[S \+ 1\]"),
    "a number": (ValueError, torch.tensor(8), r"has shape \(\), expected \[S \+ 1\]"),
    "nothing": (ValueError, torch.zeros(0, dtype=torch.int64), r"has shape \(0,\), expected \[S \+ 1\]"),
    "sparse": (TypeError, torch.tensor(GOOD).to_sparse(), "must be a dense strided tensor, got torch.sparse_coo"),
    "another device": (RuntimeError, torch.tensor(GOOD, device="meta"), "and tokens must be on one device"),
    "a list of floats": (TypeError, [0.0, 3.0, 4.0, 6.0, 8.0], "a list that holds a float"),
    "a list of bools": (TypeError, [False, True], "a list that holds a bool"),
    "a list of lists": (TypeError, [list(GOOD)], "a list that holds a list"),
    "a list of tensors": (TypeError, list(torch.tensor(GOOD)), "a list that holds a Tensor"),
    "a list of huge numbers": (ValueError, [0, 2**70], "cu_seqlens holds 1180591620717411303424"),
    "a string": (TypeError, "0 8", "must be an int32 or int64 tensor, got str"),
}


@pytest.mark.fault(127)
@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name].__code__.co_names.count("_ones") == 0])
def test_every_function_refuses_offsets_of_another_kind(name):
    function = re.match(r"\w+", name).group()
    for error, cu, message in KINDS.values():
        with pytest.raises(error, match=f"^{function}: .*{message}"):
            CALLS[name](cu)


def scores(h=HIDDEN, w=WEIGHT[:1], **options):
    return rlk.reward_scores(h, w, **options)


@pytest.mark.fault(127)
@pytest.mark.parametrize("ends, named", [((0, 0, 8), 0), ((0, 4, 4, 8), 1), ((0, 4, 8, 8), 2)], ids=str)
def test_an_empty_sequence_has_no_score(ends, named):
    for cu in (torch.tensor(ends), list(ends)):
        with pytest.raises(
            ValueError, match=f"^reward_scores: cu_seqlens makes sequence {named} empty .* leave it out"
        ):
            scores(cu_seqlens=cu)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=f"^reward_scores: cu_seqlens makes sequence {named} empty"):
        torch.compile(lambda cu: scores(cu_seqlens=cu), backend="eager", fullgraph=True)(torch.tensor(ends))


@pytest.mark.fault(127)
@pytest.mark.parametrize("ends", [(0, 0, 8), (0, 4, 4, 8), (0, 4, 8, 8)], ids=str)
def test_where_values_are_not_read_an_empty_sequence_scores_0_without_a_gradient(ends, monkeypatch):
    """Neither its neighbour's score nor a share in its neighbour's gradient, even where that neighbour is NaN."""
    monkeypatch.setattr(checks_tokens, "values_are_read", lambda cu: False)
    empty = [a == b for a, b in zip(ends, ends[1:], strict=False)]
    want = torch.stack(
        [torch.zeros(()) if a == b else HIDDEN[b - 1] @ WEIGHT[0] + 1.0 for a, b in zip(ends, ends[1:], strict=False)]
    )
    for poison in (1.0, float("nan")):
        h, w, b = (
            (HIDDEN * poison).requires_grad_(),
            WEIGHT[:1].clone().requires_grad_(),
            torch.ones(1, requires_grad=True),
        )
        got = scores(h, w, bias=b, cu_seqlens=torch.tensor(ends))
        assert not got[empty].any()
        gradients = torch.autograd.grad(got[empty].sum(), (h, w, b))
        if poison == 1.0:
            torch.testing.assert_close(got, want)
            assert not any(g.any() for g in gradients)
        assert not gradients[0].any() and not gradients[2].any()
    nothing = scores(torch.zeros(0, 4, requires_grad=True), cu_seqlens=torch.tensor([0, 0]))
    assert nothing.tolist() == [0.0] and nothing.requires_grad


BAD_SCORES = {
    "both": (
        ValueError,
        "attention_mask is for padded hidden states",
        {"cu_seqlens": torch.tensor(GOOD), "attention_mask": torch.ones(1, 8)},
    ),
    "bias list": (TypeError, "bias must be a torch.Tensor, got list", {"cu_seqlens": [0, 8], "bias": [0.0]}),
    "bias integers": (
        TypeError,
        "bias has dtype torch.int64",
        {"cu_seqlens": [0, 8], "bias": torch.zeros(1, dtype=torch.int64)},
    ),
    "bias complex": (
        TypeError,
        "bias has dtype torch.complex64",
        {"cu_seqlens": [0, 8], "bias": torch.zeros(1, dtype=torch.complex64)},
    ),
    "bias dtype": (
        TypeError,
        "bias has dtype torch.float64, hidden has torch.float32",
        {"cu_seqlens": [0, 8], "bias": torch.zeros(1, dtype=torch.float64)},
    ),
    "bias shape": (
        ValueError,
        r"bias has shape \(\), expected "
        r"\(1,\)",
        {"cu_seqlens": [0, 8], "bias": torch.zeros(())},
    ),
    "weight dtype": (
        TypeError,
        "weight has dtype torch.bfloat16, hidden has torch.float32",
        {"cu_seqlens": [0, 8], "w": WEIGHT[:1].bfloat16()},
    ),
    "weight float64": (
        TypeError,
        "weight has dtype torch.float64, hidden has torch.float32",
        {"cu_seqlens": [0, 8], "w": WEIGHT[:1].double()},
    ),
    "no token": (ValueError, r"hidden has shape \(2, 0, 4\): sequences without a token", {"h": torch.zeros(2, 0, 4)}),
}


@pytest.mark.fault(127)
@pytest.mark.parametrize("case", BAD_SCORES)
def test_reward_scores_refuses_what_it_would_ignore_or_guess(case):
    error, message, options = BAD_SCORES[case]
    with pytest.raises(error, match=f"^reward_scores: {message}"):
        scores(**options)


@pytest.mark.fault(127)
def test_under_autocast_a_head_of_another_dtype_is_taken():
    with torch.autocast("cpu", torch.bfloat16):
        got = scores(HIDDEN.bfloat16(), cu_seqlens=[0, 8])
    torch.testing.assert_close(got, (HIDDEN[-1:].bfloat16().float() * WEIGHT[0]).sum(-1))
    assert scores(torch.zeros(0, 0, 4)).shape == (0,)


# F137 -----------------------------------------------------------------------------------------------------------------

CU = torch.tensor([0, 3, 3, 3])  # three tokens, three sequences, two of them empty
PER = torch.tensor([2.0, 5.0, 7.0])
TAKES = {
    "policy_loss": lambda per, cu: rlk.policy_loss(Z[:3], OLD[:3], per, cu_seqlens=cu),
    "logits_policy_loss": lambda per, cu: rlk.logits_policy_loss(LOGITS[:3], TARGETS[:3], OLD[:3], per, cu_seqlens=cu),
    "linear_policy_loss": lambda per, cu: rlk.linear_policy_loss(
        HIDDEN[:3], WEIGHT, TARGETS[:3], OLD[:3], per, cu_seqlens=cu
    ),
    "sft_loss": lambda per, cu: rlk.sft_loss(LOGITS[:3], TARGETS[:3], sample_weights=per, cu_seqlens=cu),
    "logprobs_sft_loss": lambda per, cu: rlk.logprobs_sft_loss(Z[:3], sample_weights=per, cu_seqlens=cu),
    "linear_sft_loss": lambda per, cu: rlk.linear_sft_loss(
        HIDDEN[:3], WEIGHT, TARGETS[:3], sample_weights=per, cu_seqlens=cu
    ),
}


@pytest.mark.fault(137)
@pytest.mark.parametrize("name", TAKES)
def test_one_number_per_sequence_is_not_taken_for_one_per_token(name, backend):
    argument = "sample_weights" if "sft" in name else "advantages"
    call = TAKES[name]
    with pytest.raises(
        ValueError,
        match=rf"^{name}: {argument} has shape \(3,\) in a batch of 3 tokens and 3 "
        r"sequences: .* Pass \[S, 1\]",
    ):
        call(PER, CU)
    # The truth: the same without the empty sequences, every token with its sequence's number.
    torch.testing.assert_close(
        call(PER[:, None], CU), call(PER[:1].expand(3).contiguous(), torch.tensor([0, 3])), rtol=0, atol=0
    )
    torch.testing.assert_close(
        call(PER[1:, None], torch.tensor([0, 0, 3])),
        call(PER[2:].expand(3).contiguous(), torch.tensor([0, 3])),
        rtol=0,
        atol=0,
    )


@pytest.mark.fault(137)
@pytest.mark.parametrize("name", TAKES)
def test_sequences_of_one_token_each_may_be_read_either_way(name, backend):
    cu = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(TAKES[name](PER, cu), TAKES[name](PER[:, None], cu), rtol=0, atol=0)


@pytest.mark.fault(137)
def test_without_values_only_the_shape_decides():
    """On an accelerator lengths are not known to the host: [S] is ambiguous wherever S is the number of tokens, but for
    one token.
    """
    meta, offsets = torch.zeros(3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\) .* Pass \[S, 1\]"):
        sequences.per_token("here", "advantages", meta, meta, offsets)
    assert sequences.per_token("here", "advantages", meta[:, None], meta, offsets).shape == (3,)
    assert sequences.per_token("here", "advantages", meta[:2], meta, offsets[:3]).shape == (3,)
    assert sequences.per_token("here", "advantages", meta[:1], meta[:1], offsets[:2]).shape == (1,)


@pytest.mark.fault(137)
@pytest.mark.parametrize("name", TAKES)
def test_a_number_per_sequence_on_another_device_is_named(name):
    argument = "sample_weights" if "sft" in name else "advantages"
    with pytest.raises(RuntimeError, match=f"^{name}: .* and {argument} must be on one device"):
        TAKES[name](PER[:, None].to("meta"), CU)
