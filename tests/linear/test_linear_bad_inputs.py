"""Bad inputs of the losses of the head: the rows of the table that concern each of them, and options of their own."""

import math
import re

import pytest
import torch
from bad_calls import CU, GRAD, A, H, W, Y, sharded_weight, with_target, with_temperature

import rlkernels as rlk

NAN, INF = math.nan, math.inf
REFS, GOOD = torch.zeros(4), torch.tensor([True, False, True, True])


def policy(h=H, w=W, y=Y, mask=None, old=A, advantages=A, **options):
    return rlk.linear_policy_loss(h, w, y, old, advantages, mask, **options)


def sft(h=H, w=W, y=Y, mask=None, **options):
    return rlk.linear_sft_loss(h, w, y, mask, **options)


def dpo(h=H, w=W, y=Y, mask=None, **options):
    return rlk.linear_dpo_loss(
        h, w, y, mask, **{"ref_chosen_logps": REFS[:2], "ref_rejected_logps": REFS[:2], **options}
    )


def unpaired(h=H, w=W, y=Y, mask=None, refs=REFS, desirable=GOOD, **options):
    return rlk.linear_unpaired_preference_loss(h, w, y, refs, desirable, mask, **{"kl": 0.0, **options})


FUNCTIONS = {
    "linear_policy_loss": policy,
    "linear_sft_loss": sft,
    "linear_dpo_loss": dpo,
    "linear_unpaired_preference_loss": unpaired,
}
# Of every function: (arguments, exception, what the message matches).
SHARED = {
    "B01 hidden": ({"h": [[0.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "B03 hidden": (
        {"h": H.long()},
        TypeError,
        "hidden has dtype torch.int64; supported: float32, bfloat16, float16, float64",
    ),
    "B04 weight": ({"w": W.to_sparse()}, TypeError, "weight must be a dense strided tensor"),
    "B05 float": ({"y": Y.float()}, TypeError, "targets must be int32 or int64, got torch.float32"),
    "B05 bool": ({"y": Y.bool()}, TypeError, "targets must be int32 or int64, got torch.bool"),
    "B06": ({"y": Y[:, :7]}, ValueError, r"targets has shape \(4, 7\), expected \(4, 8\)"),
    "B07 weight": ({"w": W.to("meta")}, RuntimeError, "hidden and weight must be on one device, got cpu and meta"),
    "B07 targets": ({"y": Y.to("meta")}, RuntimeError, "hidden and targets must be on one device, got cpu and meta"),
    "B07 mask": ({"mask": A.to("meta")}, RuntimeError, "must be on one device, got cpu and meta"),
    "B08 V": ({"y": with_target(37)}, IndexError, r"target 37 at row 5 is outside \[0, 37\)"),
    "B08 negative": ({"y": with_target(-1).int()}, IndexError, r"target -1 at row 5 is outside \[0, 37\)"),
    "B08 padding": ({"y": with_target(30), "valid_vocab": 30}, IndexError, r"target 30 at row 5 is outside \[0, 30\)"),
    "B09": ({"ignore_index": -100.0}, TypeError, "ignore_index must be int, got float"),
    "B10 zero": ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    "B10 NaN": ({"temperature": NAN}, ValueError, "temperature must be positive and finite, got nan"),
    "B11": ({"temperature": torch.ones(8)}, ValueError, r"temperature has shape \(8,\), expected \(4, 8\)"),
    "B12": (
        {"temperature": with_temperature(0.0)},
        ValueError,
        "temperature must be positive and finite, got 0.0 at row 3",
    ),
    "B15": ({"mask": A[:, :7]}, ValueError, r"mask has shape \(4, 7\), expected \(4, 8\)"),
    "B16": ({"mask": A.to(torch.complex64)}, TypeError, "mask must be bool, integer or floating, got torch.complex64"),
    "B21": ({"w": torch.zeros(37, 15)}, ValueError, "hidden has 16 features, weight has 15"),
    "B21 weight of three dimensions": (
        {"w": W[None]},
        ValueError,
        r"expected \[..., H\] and \[V, H\], got \(4, 8, 16\) and \(1, 37, 16\)",
    ),
    "B22": ({"w": torch.zeros(0, 16)}, ValueError, "weight has 0 elements; gather it first"),
    "B24": ({"bias": torch.zeros(36)}, ValueError, r"bias has shape \(36,\), expected \(37,\)"),
    "B25 weight": ({"w": W.bfloat16()}, TypeError, "weight has dtype torch.bfloat16, hidden has torch.float32"),
    "B25 bias": ({"bias": torch.zeros(37).half()}, TypeError, "bias has dtype torch.float16, hidden has torch.float32"),
    "B26 zero": ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    "B26 NaN": ({"softcap": NAN}, ValueError, "softcap must be positive"),
    "B27": ({"logit_scale": INF}, ValueError, "logit_scale must be finite, got inf"),
    "B28 zero": ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be a positive int or None, got 0"),
    "B28 fraction": ({"chunk_tokens": 1.5}, TypeError, "chunk_tokens must be a positive int or None, got float"),
    "B29": ({"logits_dtype": torch.int64}, TypeError, "logits_dtype must be floating"),
    "logits of more digits": (
        {"logits_dtype": torch.float64},
        TypeError,
        "logits_dtype is torch.float64, hidden has dtype torch.float32; float64 logits are",
    ),
    "logits of fewer": (
        {"h": H.double(), "w": W.double(), "logits_dtype": torch.bfloat16},
        TypeError,
        "logits_dtype is torch.bfloat16, hidden has dtype torch.float64",
    ),
    "budget zero": ({"logits_budget": 0}, ValueError, "logits_budget must be a positive int or None, got 0"),
    "budget of a float": (
        {"logits_budget": 2.0**30},
        TypeError,
        "logits_budget must be a positive int or None, got float",
    ),
    "bound zero": ({"max_live_tokens": 0}, ValueError, "max_live_tokens must be a positive int or None, got 0"),
    "vocabulary of a bool": ({"valid_vocab": True}, TypeError, "valid_vocab must be a positive int or None, got bool"),
    "vocabulary larger than the weight": ({"valid_vocab": 38}, ValueError, "valid_vocab is 38, weight has 37 rows"),
    "B52": (
        {"vocab_start": 0, "valid_vocab": 37},
        ValueError,
        "vocab_start says where a shard begins; it needs process_group",
    ),
}
PACKED = {"h": H.view(32, 16), "y": Y.view(32)}
POLICY = {"old": A.view(32), "advantages": A.view(32), **PACKED}
OWN = {
    "B31 advantages": (
        policy,
        {"advantages": torch.zeros(4, 1, 1)},
        ValueError,
        r"advantages has shape \(4, 1, 1\), "
        r"expected \(4, 8\)",
    ),
    "B31 old_logprobs": (
        policy,
        {"old": torch.zeros(4, 1)},
        ValueError,
        r"old_logprobs has shape \(4, 1\), expected "
        r"\(4, 8\)",
    ),
    "B31 ref_logprobs": (
        policy,
        {"ref_logprobs": torch.zeros(8), "kl_coef": 0.1},
        ValueError,
        r"ref_logprobs has "
        r"shape \(8,\), "
        r"expected \(4, 8\)",
    ),
    "B31 sample_weights": (
        sft,
        {"sample_weights": torch.zeros(8)},
        ValueError,
        r"sample_weights has shape \(8,\), "
        r"expected \(4, 8\)",
    ),
    "B31 references": (
        dpo,
        {"ref_chosen_logps": REFS},
        ValueError,
        r"ref_chosen_logps has shape \(4,\), expected "
        r"\(2,\)",
    ),
    "B31 pair_weights": (dpo, {"pair_weights": REFS}, ValueError, r"pair_weights has shape \(4,\), expected \(2,\)"),
    "B31 ref_logps": (unpaired, {"refs": REFS[:3]}, ValueError, r"ref_logps has shape \(3,\), expected \(4,\)"),
    "B31 desirable": (
        unpaired,
        {"desirable": GOOD[:, None]},
        ValueError,
        r"desirable has shape \(4, 1\), expected "
        r"\(4,\)",
    ),
    "B31 desirable of a list": (
        unpaired,
        {"desirable": [True] * 4},
        TypeError,
        "desirable must be a torch.Tensor, got list",
    ),
    "B32 advantages": (policy, {"advantages": GRAD}, ValueError, "advantages gets no gradient; detach it"),
    "B32 old_logprobs": (policy, {"old": GRAD}, ValueError, "old_logprobs gets no gradient; detach it"),
    "B32 weights": (sft, {"weights": GRAD}, ValueError, "weights gets no gradient; detach it"),
    "B32 references": (
        dpo,
        {"ref_rejected_logps": torch.zeros(2, requires_grad=True)},
        ValueError,
        "ref_rejected_logps gets no gradient; detach it",
    ),
    "B32 ref_logps": (
        unpaired,
        {"refs": torch.zeros(4, requires_grad=True)},
        ValueError,
        "ref_logps gets no gradient; detach it",
    ),
    "B33": (policy, {"objective": "ppo2"}, ValueError, "objective must be one of .*ppo_clip.* got 'ppo2'"),
    "B33 not a policy": (policy, {"objective": "pairwise"}, ValueError, "objective must be one of .* got 'pairwise'"),
    "B34 unknown": (
        policy,
        {"objective": "cispo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
        TypeError,
        "objective 'cispo' takes no 'dual_clip'",
    ),
    "B34 missing": (policy, {"objective": "cispo", "clip_low": 1.0}, TypeError, "objective 'cispo' needs 'clip_high'"),
    "B35": (policy, {"clip_low": NAN}, ValueError, r"clip_low must be in \[0, 1\]"),
    "B36": (policy, {"objective": "dual_clip", "dual_clip": 1.0}, ValueError, "dual_clip must be > 1, got 1.0"),
    "B37": (
        policy,
        {"aggregation": "tokenmean"},
        ValueError,
        "aggregation must be one of .*token-mean.* got 'tokenmean'",
    ),
    "B37 sft": (
        sft,
        {"aggregation": "tokenmean"},
        ValueError,
        "aggregation must be one of .*token-mean.* got 'tokenmean'",
    ),
    "B38": (policy, {"aggregation": "fixed-horizon"}, ValueError, "aggregation 'fixed-horizon' needs horizon"),
    "B39": (policy, {"weights": A, "aggregation": "seq-mean-token-mean"}, ValueError, "weights .* aggregation"),
    "B39 sums": (
        policy,
        {"normalizers": {"batch_num_tokens": 9}, "ratio_level": "sequence_sum"},
        ValueError,
        "'seq-mean' takes no batch_num_tokens",
    ),
    "B40 dtype": (
        policy,
        {**POLICY, "cu_seqlens": torch.tensor([0.0, 32.0])},
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor",
    ),
    "B40 last": (
        policy,
        {**POLICY, "ratio_level": "sequence", "cu_seqlens": CU},
        ValueError,
        "cu_seqlens ends at 8, expected the number of tokens, 32",
    ),
    "B40 last sft": (
        sft,
        {**PACKED, "cu_seqlens": CU},
        ValueError,
        "cu_seqlens ends at 8, expected the number of tokens, 32",
    ),
    "B40 last dpo": (
        dpo,
        {**PACKED, "cu_seqlens": CU},
        ValueError,
        "cu_seqlens ends at 8, expected the number of tokens, 32",
    ),
    "B40 decreasing": (
        unpaired,
        {**PACKED, "cu_seqlens": torch.tensor([0, 9, 3, 20, 32])},
        ValueError,
        "cu_seqlens decreases from 9 to 3 at entry 2",
    ),
    "B40 absent": (
        policy,
        {**POLICY, "ratio_level": "sequence"},
        ValueError,
        r"ratio_level 'sequence' needs hidden \[B, L, H\], or packed \[T, H\] with cu_seqlens",
    ),
    "B40 absent dpo": (
        dpo,
        PACKED,
        ValueError,
        r"hidden has shape \(32, 16\), expected \[B, L, H\], or \[T, H\] "
        r"together with cu_seqlens",
    ),
    "B40 padded": (
        dpo,
        {"cu_seqlens": CU},
        ValueError,
        r"hidden has shape \(4, 8, 16\), expected \[B, L, H\], or \[T, "
        r"H\] together with cu_seqlens",
    ),
    "B41 NaN": (policy, {"entropy_coef": NAN}, ValueError, "entropy_coef must be finite, got nan"),
    "B19": (policy, {"kl_coef": 0.1}, ValueError, "kl='k3' needs ref_logprobs where kl_coef is not 0"),
    "B20": (policy, {"kl": "k4"}, ValueError, "kl must be one of .*k1.* got 'k4'"),
    "B42": (dpo, {"beta": -1.0}, ValueError, "beta must be positive and finite, got -1.0"),
    "B42 unpaired": (unpaired, {"beta": NAN}, ValueError, "beta must be positive and finite, got nan"),
    "B43 above one": (dpo, {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "B43 exo_pair": (
        dpo,
        {"loss_type": "exo_pair"},
        ValueError,
        r"label_smoothing must be in \(0, 1\) for loss_type "
        r"'exo_pair'",
    ),
    "B44 dpo": (dpo, {"loss_type": "dpo"}, ValueError, "loss_type must be one of sigmoid, hinge, .*; got 'dpo'"),
    "B44 unpaired": (unpaired, {"loss_type": "sigmoid"}, ValueError, "loss_type must be one of kto, .*; got 'sigmoid'"),
    "B44 kind": (sft, {"kind": "eaft"}, ValueError, "kind must be one of nll, dft, asft; got 'eaft'"),
    "B44 ratio_level": (policy, {"ratio_level": "row"}, ValueError, "ratio_level must be one of .* got 'row'"),
    "a reference that is missing": (
        dpo,
        {"ref_chosen_logps": None, "ref_rejected_logps": None},
        ValueError,
        "ref_chosen_logps is missing; pass it, or reference_free",
    ),
    "one reference of two": (dpo, {"ref_rejected_logps": None}, ValueError, "ref_rejected_logps is missing"),
    "an answer without its pair": (
        dpo,
        {"h": H[:3], "y": Y[:3]},
        ValueError,
        "hidden holds 3 answers; they come in pairs: the chosen ones first",
    ),
    "kl that is missing": (unpaired, {"kl": None}, ValueError, "kl is missing; pass kl, or kl_logps and ref_kl_logps"),
    "one row policy": (
        policy,
        {"h": H[0, 0], "y": Y[0, 0], "old": A[0, 0], "advantages": A[0, 0]},
        ValueError,
        r"hidden has shape \(16,\), expected \[T, H\]",
    ),
    "one row sft": (
        sft,
        {"h": H[0, 0], "y": Y[0, 0]},
        ValueError,
        r"hidden has shape \(16,\), expected \[T, H\] or "
        r"\[B, L, H\]; unsqueeze the one row",
    ),
    "a bound too small": (
        policy,
        {"max_live_tokens": 31},
        ValueError,
        "max_live_tokens=31, but 32 tokens are live; raise the bound, or pass None",
    ),
    "a bound too small sft": (sft, {"max_live_tokens": 1}, ValueError, "max_live_tokens=1, but 32 tokens are live"),
    "a bound too small for sequences": (
        policy,
        {"max_live_tokens": 31, "ratio_level": "sequence"},
        ValueError,
        "max_live_tokens=31, but 32 tokens are live",
    ),
    "a bound too small for pairs": (
        dpo,
        {"max_live_tokens": 31},
        ValueError,
        "max_live_tokens=31, but 32 tokens are live",
    ),
    "a bound too small for answers": (
        unpaired,
        {"max_live_tokens": 31},
        ValueError,
        "max_live_tokens=31, but 32 tokens are live",
    ),
    "a bound too small for sequences in chunks": (
        policy,
        {"max_live_tokens": 31, "chunk_tokens": 8, "ratio_level": "sequence"},
        ValueError,
        "max_live_tokens=31, but 32 tokens are live",
    ),
    "a bound too small for pairs in chunks": (
        dpo,
        {"max_live_tokens": 31, "chunk_tokens": 8},
        ValueError,
        "max_live_tokens=31, but 32 tokens are live",
    ),
    "an unknown option policy": (
        policy,
        {"inplace_backward": None},
        TypeError,
        "objective 'ppo_clip' takes no 'inplace_backward'",
    ),
    "an unknown option dpo": (
        dpo,
        {"inplace_backward": True},
        TypeError,
        "loss_type 'sigmoid' takes no 'inplace_backward'",
    ),
    "an unknown option unpaired": (
        unpaired,
        {"label_smoothing": 0.1},
        TypeError,
        "got an unexpected keyword argument 'label_smoothing'",
    ),
}
OF_BOUND = "a bound too small"  # found where rows are chosen


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", SHARED, ids=[name.replace(" ", "-") for name in SHARED])
def test_a_bad_argument_of_the_head_is_named_by_every_loss(case, function, backend):
    arguments, error, message = SHARED[case]
    with pytest.raises(error, match=message) as caught:
        FUNCTIONS[function](**arguments)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{function}: ")


@pytest.mark.parametrize("case", OWN, ids=[name.replace(" ", "-") for name in OWN])
def test_a_bad_argument_of_one_loss_is_named(case, backend):
    function, arguments, error, message = OWN[case]
    with pytest.raises(error, match=message) as caught:
        function(**arguments)
    assert type(caught.value) is error
    name = next(name for name, known in FUNCTIONS.items() if known is function)
    # Python itself refuses an unknown keyword, and writes the name as a call.
    assert case.startswith(OF_BOUND) or str(caught.value).startswith((f"{name}: ", f"{name}() ")), str(caught.value)


def test_an_option_that_sft_does_not_take_is_refused():
    for option in ("objective", "kl_coef", "vocab_mask", "inplace_backward", "label_smoothing"):
        with pytest.raises(TypeError, match=re.escape(option)):
            sft(**{option: 0.1})


def test_B23_a_sharded_weight_is_refused_with_what_to_do(monkeypatch):
    for function in FUNCTIONS.values():
        monkeypatch.setattr("bad_calls.linear", lambda w, f=function: f(w=w))
        with pytest.raises(TypeError, match=r"weight is a DTensor; pass weight.full_tensor\(\)"):
            sharded_weight()


def test_good_arguments_raise_nothing():
    for function in FUNCTIONS.values():
        assert function().isfinite()
        assert function(
            valid_vocab=37, logits_budget=1, chunk_tokens=3, temperature=torch.ones(4, 8), softcap=3, ignore_index=0
        ).isfinite()


@pytest.mark.parametrize("way", ["linear_policy_loss", "linear_sft_loss"])
@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"ref_weight": torch.ones(9, 3)}, "ref_hidden has 4 features, ref_weight has 3"),
        ({"ref_bias": torch.ones(7)}, r"ref_bias has shape \(7,\), expected \(9,\)"),
        ({"ref_weight": torch.ones(0)}, "ref_weight has 0 elements; gather it first"),
    ],
)
def test_a_wrong_head_of_the_reference_is_named_by_its_own_argument(way, wrong, text):
    own = torch.ones(2, 3, 4), torch.ones(9, 4), torch.zeros(2, 3, dtype=torch.int64)
    reference = {"ref_hidden": torch.ones(2, 3, 4), "ref_weight": torch.ones(9, 4), **wrong}
    with pytest.raises(ValueError, match=f"^{way}: {text}"):
        if way == "linear_sft_loss":
            rlk.linear_sft_loss(*own, kind="asft", asft_alpha=0.1, **reference)
        else:
            zeros = torch.zeros(2, 3)
            rlk.linear_policy_loss(*own, zeros, zeros, kl="reverse_kl", kl_coef=0.1, **reference)
