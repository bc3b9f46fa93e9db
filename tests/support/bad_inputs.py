"""The table of bad inputs, B01 to B58: what is called, what it raises, what the message says; and the rows that have no
case here.
"""

import math

import numpy
import reward_calls
import torch
from bad_calls import (
    GRAD,
    PACKED,
    PER_CU,
    A,
    H,
    W,
    X,
    Y,
    backward_into,
    default_objective,
    double_backward,
    dpo,
    linear,
    logits_policy,
    logps,
    loop_objective,
    one_result_objective,
    pairs,
    policy,
    pow_objective,
    sharded_weight,
    stats,
    unpaired,
    with_target,
    with_temperature,
)
from torch import distributed

import rlkernels as rlk
from rlkernels.backends import BACKENDS, KNOWN, absent, serving, use_backend

NAN, INF = math.nan, math.inf


def in_one_process(**options):
    """A head over a group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return linear(process_group=distributed.group.WORLD, **options)
    finally:
        distributed.destroy_process_group()


# number: (function that must raise, exception, what the message matches). The text after the number tells cases apart.
CASES = {
    "B01 list": (lambda: logps([[0.0]]), TypeError, "token_logprobs: logits must be a torch.Tensor, got list"),
    "B01 ndarray": (lambda: logps(numpy.zeros((4, 8, 37))), TypeError, "logits must be a torch.Tensor, got ndarray"),
    "B01 None": (lambda: policy(None), TypeError, "policy_loss: logprobs must be a torch.Tensor, got NoneType"),
    "B02 scalar": (lambda: logps(torch.tensor(1.0)), ValueError, r"logits has shape \(\), expected \[..., V\]"),
    "B02 no column": (lambda: logps(torch.zeros(4, 8, 0)), ValueError, "vocabulary dimension is empty"),
    "B03 int64": (
        lambda: logps(X.long()),
        TypeError,
        "logits has dtype torch.int64; supported: float32, bfloat16, float16, float64",
    ),
    "B03 bool": (lambda: stats(X.bool()), TypeError, "logits has dtype torch.bool; supported: "),
    "B03 complex": (lambda: logps(X.to(torch.complex64)), TypeError, "logits has dtype torch.complex64; supported: "),
    "B03 fp8": (
        lambda: logps(X.to(torch.float8_e4m3fn)),
        TypeError,
        "logits has dtype torch.float8_e4m3fn; supported: ",
    ),
    "B04 sparse": (lambda: logps(X.to_sparse()), TypeError, "logits must be a dense strided tensor"),
    "B04 quantised": (
        lambda: logps(torch.quantize_per_tensor(X, 1.0, 0, torch.qint8)),
        TypeError,
        "logits must be a dense strided tensor",
    ),
    "B04 nested": (
        lambda: logps(torch.nested.nested_tensor([X[0], X[1, :3]])),
        TypeError,
        "logits must be a dense strided tensor",
    ),
    "B05 float": (lambda: logps(y=Y.float()), TypeError, "targets must be int32 or int64, got torch.float32"),
    "B05 bool": (
        lambda: logits_policy(y=Y.bool()),
        TypeError,
        "logits_policy_loss: targets must be int32 or int64, got torch.bool",
    ),
    "B05 list": (lambda: logps(y=[0]), TypeError, "targets must be a torch.Tensor, got list"),
    "B06": (lambda: logps(y=Y[:, :7]), ValueError, r"targets has shape \(4, 7\), expected \(4, 8\)"),
    "B06 one more dimension": (
        lambda: linear(y=Y[..., None]),
        ValueError,
        r"targets has shape \(4, 8, 1\), expected \(4, 8\)",
    ),
    "B07 targets": (
        lambda: logps(y=Y.to("meta")),
        RuntimeError,
        "logits and targets must be on one device, got cpu and meta",
    ),
    "B07 temperature": (
        lambda: logps(temperature=A.to("meta") + 1),
        RuntimeError,
        "logits and temperature must be on one device, got cpu and meta",
    ),
    "B07 vocab_mask": (
        lambda: logps(vocab_mask=torch.ones(37, dtype=torch.bool, device="meta")),
        RuntimeError,
        "logits and vocab_mask must be on one device",
    ),
    "B07 advantages": (
        lambda: policy(advantages=A.to("meta")),
        RuntimeError,
        "logprobs and advantages must be on one device, got cpu and meta",
    ),
    "B07 mask": (
        lambda: policy(mask=A.to("meta")),
        RuntimeError,
        "logprobs and mask must be on one device, got cpu and meta",
    ),
    "B07 weight": (
        lambda: linear(w=W.to("meta")),
        RuntimeError,
        "hidden and weight must be on one device, got cpu and meta",
    ),
    "B07 rejected": (
        lambda: rlk.pairwise_reward_loss(torch.zeros(4), torch.zeros(4, device="meta")),
        RuntimeError,
        "chosen and rejected must be on one device",
    ),
    "B08 V": (lambda: logps(y=with_target(37)), IndexError, r"target 37 at row 5 is outside \[0, 37\)"),
    "B08 negative": (lambda: stats(y=with_target(-1).int()), IndexError, r"target -1 at row 5 is outside \[0, 37\)"),
    "B08 fused": (lambda: logits_policy(y=with_target(40)), IndexError, r"target 40 at row 5 is outside \[0, 37\)"),
    "B08 linear": (lambda: linear(y=with_target(40)), IndexError, r"target 40 at row 5 is outside \[0, 37\)"),
    "B09 float": (lambda: logps(ignore_index=-100.0), TypeError, "ignore_index must be int, got float"),
    "B09 tensor": (lambda: logps(ignore_index=torch.tensor(-100.0)), TypeError, "ignore_index must be int, got float"),
    "B09 tensors": (
        lambda: logps(ignore_index=torch.tensor([-100])),
        TypeError,
        r"ignore_index must be a number, got "
        r"a tensor of shape \(1,\) on cpu",
    ),
    "B09 too long": (
        lambda: logps(ignore_index=2**70),
        ValueError,
        "ignore_index must be a 64-bit integer, got 1180591620717411303424",
    ),
    "B10 zero": (lambda: logps(temperature=0), ValueError, "temperature must be positive and finite, got 0"),
    "B10 negative": (lambda: stats(temperature=-1.0), ValueError, "temperature must be positive and finite, got -1.0"),
    "B10 NaN": (lambda: logits_policy(temperature=NAN), ValueError, "temperature must be positive and finite, got nan"),
    "B10 inf": (lambda: linear(temperature=INF), ValueError, "temperature must be positive and finite, got inf"),
    "B10 a string": (lambda: logps(temperature="1"), TypeError, "temperature must be a number, got str"),
    "B11": (lambda: logps(temperature=torch.ones(8)), ValueError, r"temperature has shape \(8,\), expected \(4, 8\)"),
    "B11 with gradient": (
        lambda: logps(temperature=torch.ones(4, 8, requires_grad=True)),
        ValueError,
        "temperature gets no gradient",
    ),
    "B12 zero": (
        lambda: logps(temperature=with_temperature(0.0)),
        ValueError,
        "temperature must be positive and finite, got 0.0 at row 3",
    ),
    "B12 NaN": (lambda: stats(temperature=with_temperature(NAN)), ValueError, "temperature .* at row 3"),
    "B12 inf": (lambda: logits_policy(temperature=with_temperature(INF)), ValueError, "temperature .* at row 3"),
    "B12 linear": (lambda: linear(temperature=with_temperature(-1.0)), ValueError, "temperature .* at row 3"),
    "B13": (lambda: logps(vocab_mask=torch.ones(37)), TypeError, "vocab_mask must be bool, got torch.float32"),
    "B14": (
        lambda: logps(vocab_mask=torch.ones(36, dtype=torch.bool)),
        ValueError,
        r"vocab_mask has shape \(36,\), "
        r"expected \(37,\) or \(4, 8, "
        r"37\)",
    ),
    "B14 one row per sequence": (
        lambda: logps(vocab_mask=torch.ones(4, 37, dtype=torch.bool)),
        ValueError,
        r"vocab_mask has shape "
        r"\(4, 37\)",
    ),
    "B15": (lambda: policy(mask=A[:, :7]), ValueError, r"mask has shape \(4, 7\), expected \(4, 8\)"),
    "B15 fused": (lambda: logits_policy(mask=A[:, :1]), ValueError, r"mask has shape \(4, 1\), expected \(4, 8\)"),
    "B15 values": (lambda: rlk.value_loss(A, A, A, A[0]), ValueError, r"mask has shape \(8,\), expected \(4, 8\)"),
    "B16": (
        lambda: policy(mask=A.to(torch.complex64)),
        TypeError,
        "mask must be bool, integer or floating, got torch.complex64",
    ),
    "B17": (lambda: stats(outputs=("entropi",)), ValueError, "outputs: unknown 'entropi'; known: entropy"),
    "B17 a string": (
        lambda: stats(outputs="entropy"),
        TypeError,
        "outputs must be a tuple of names, got the string 'entropy'",
    ),
    "B17 linear": (
        lambda: rlk.linear_token_stats(H, W, Y, outputs=("kl",)),
        ValueError,
        "outputs: unknown 'kl'; known: ",
    ),
    "B18 shape": (
        lambda: stats(ref_logits=X[:, :7]),
        ValueError,
        r"ref_logits has shape \(4, 7, 37\), expected \(4, "
        r"8, 37\)",
    ),
    "B18 gradient": (lambda: stats(ref_logits=X.clone().requires_grad_()), ValueError, "ref_logits gets no gradient"),
    "B18 device": (lambda: stats(ref_logits=X.to("meta")), RuntimeError, "logits and ref_logits must be on one device"),
    "B18 dtype": (
        lambda: stats(ref_logits=X.half()),
        TypeError,
        "ref_logits has dtype torch.float16, logits torch.float32",
    ),
    "B19": (lambda: policy(kl="k3", kl_coef=0.1), ValueError, "kl='k3' needs ref_logprobs"),
    "B19 logits": (lambda: stats(kl="exact"), ValueError, "kl='exact' needs ref_logits"),
    "B20": (lambda: policy(kl="k4"), ValueError, "kl must be one of .*k1.* got 'k4'"),
    "B20 logits": (lambda: stats(kl="k4", ref_logits=X), ValueError, "kl must be one of .*exact.* got 'k4'"),
    "B21": (
        lambda: linear(torch.zeros(4, 8, 1024), torch.zeros(37, 2048)),
        ValueError,
        "hidden has 1024 features, weight has 2048",
    ),
    "B22": (lambda: linear(w=torch.zeros(0)), ValueError, "weight has 0 elements; gather it first"),
    "B23": (sharded_weight, TypeError, r"DTensor; pass weight.full_tensor\(\)"),
    "B24": (lambda: linear(bias=torch.zeros(36)), ValueError, r"bias has shape \(36,\), expected \(37,\)"),
    "B25 weight": (
        lambda: linear(w=W.bfloat16()),
        TypeError,
        "weight has dtype torch.bfloat16, hidden has torch.float32",
    ),
    "B25 bias": (
        lambda: linear(bias=torch.zeros(37, dtype=torch.float64)),
        TypeError,
        "bias has dtype torch.float64, hidden has torch.float32",
    ),
    "B26 zero": (lambda: linear(softcap=0.0), ValueError, "softcap must be positive"),
    "B26 NaN": (lambda: linear(softcap=NAN), ValueError, "softcap must be positive"),
    "B27 NaN": (lambda: linear(logit_scale=NAN), ValueError, "logit_scale must be finite, got nan"),
    "B27 inf": (lambda: linear(logit_scale=INF), ValueError, "logit_scale must be finite, got inf"),
    "B28 zero": (lambda: linear(chunk_tokens=0), ValueError, "chunk_tokens must be a positive int or None, got 0"),
    "B28 negative": (
        lambda: linear(chunk_tokens=-4),
        ValueError,
        "chunk_tokens must be a positive int or None, got -4",
    ),
    "B28 fraction": (lambda: linear(chunk_tokens=1.5), TypeError, "chunk_tokens must be a positive int or None"),
    "B29": (lambda: linear(logits_dtype=torch.int64), TypeError, "logits_dtype must be floating"),
    "B30 leaf": (lambda: backward_into(lambda x: x), RuntimeError, "inplace_backward needs a non-leaf tensor"),
    "B30 expanded": (
        lambda: backward_into(lambda x: x[:1].exp().expand(4, 8, 37)),
        RuntimeError,
        "inplace_backward needs non-overlapping memory",
    ),
    "B30 overlapping": (
        lambda: backward_into(lambda x: (x * 1).view(-1).as_strided((4, 8, 37), (8, 1, 1))),
        RuntimeError,
        "inplace_backward needs non-overlapping memory",
    ),
    "B31 advantages": (
        lambda: policy(torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(4, 1, 1)),
        ValueError,
        r"advantages has shape \(4, 1, 1\), expected \(4, 9\)",
    ),
    "B31 old_logprobs": (
        lambda: policy(old=torch.zeros(4, 1)),
        ValueError,
        r"old_logprobs has shape \(4, 1\), "
        r"expected \(4, 8\)",
    ),
    "B31 ref_logprobs": (
        lambda: policy(ref_logprobs=torch.zeros(8)),
        ValueError,
        r"ref_logprobs has shape \(8,\), "
        r"expected \(4, 8\)",
    ),
    "B31 packed": (
        lambda: policy(PACKED, PACKED, torch.zeros(3), **PER_CU),
        ValueError,
        r"advantages has shape "
        r"\(3,\), expected \(8,\)",
    ),
    "B31 weights": (lambda: policy(weights=torch.zeros(4)), ValueError, r"weights has shape \(4,\), expected \(4, 8\)"),
    "B31 entropy": (
        lambda: policy(entropy=torch.zeros(4), entropy_coef=0.1),
        ValueError,
        r"entropy has shape \(4,\), "
        r"expected \(4, 8\)",
    ),
    "B31 margin": (
        lambda: rlk.pairwise_reward_loss(*pairs(), margin=torch.zeros(3)),
        ValueError,
        r"margin has shape \(3,\), expected \(4,\)",
    ),
    "B31 fused": (
        lambda: logits_policy(old=torch.zeros(4, 1)),
        ValueError,
        r"old_logprobs has shape \(4, 1\), "
        r"expected \(4, 8\)",
    ),
    "B32 advantages": (lambda: policy(advantages=GRAD), ValueError, "advantages gets no gradient; detach it"),
    "B32 old_logprobs": (lambda: policy(old=GRAD), ValueError, "old_logprobs gets no gradient; detach it"),
    "B32 ref_logprobs": (lambda: policy(ref_logprobs=GRAD), ValueError, "ref_logprobs gets no gradient; detach it"),
    "B32 weights": (lambda: policy(weights=GRAD), ValueError, "weights gets no gradient; detach it"),
    "B32 one per row": (
        lambda: policy(advantages=torch.zeros(4, 1, requires_grad=True)),
        ValueError,
        "advantages gets no gradient; detach it",
    ),
    "B32 fused": (
        lambda: logits_policy(old=GRAD),
        ValueError,
        "logits_policy_loss: old_logprobs gets no gradient; detach it",
    ),
    "B32 returns": (lambda: rlk.value_loss(A, None, GRAD), ValueError, "returns gets no gradient; detach it"),
    "B32 reference": (
        lambda: rlk.dpo_loss(*pairs(), torch.zeros(4, requires_grad=True), torch.zeros(4)),
        ValueError,
        "ref_chosen_logps gets no gradient",
    ),
    "B33": (lambda: policy(objective="ppo2"), ValueError, "objective must be one of .*ppo_clip.* got 'ppo2'"),
    "B33 not a policy": (
        lambda: policy(objective="pairwise"),
        ValueError,
        "objective must be one of .* got 'pairwise'",
    ),
    "B34 unknown": (
        lambda: policy(objective="cispo", clip_low=0.2, clip_high=0.2, dual_clip=3.0),
        TypeError,
        "objective 'cispo' takes no 'dual_clip'",
    ),
    "B34 missing": (
        lambda: logits_policy(objective="cispo", clip_low=1.0),
        TypeError,
        "objective 'cispo' needs 'clip_high'",
    ),
    "B34 misspelt": (
        lambda: policy(clip_hihg=0.28),
        TypeError,
        "objective 'ppo_clip' takes no 'clip_hihg'; it takes clip_low, clip_high",
    ),
    "B34 of another function": (
        lambda: policy(temperature=0.7),
        TypeError,
        "objective 'ppo_clip' takes no 'temperature'",
    ),
    "B34 none taken": (
        lambda: policy(objective="reinforce", beta=1.0),
        TypeError,
        "objective 'reinforce' takes no 'beta'; it takes no parameters",
    ),
    "B35 negative": (lambda: policy(clip_low=-0.1), ValueError, r"clip_low must be in \[0, 1\]"),
    "B35 above one": (lambda: policy(clip_low=1.1), ValueError, r"clip_low must be in \[0, 1\]"),
    "B35 NaN": (lambda: policy(clip_low=NAN), ValueError, r"clip_low must be in \[0, 1\]"),
    "B35 high negative": (lambda: logits_policy(clip_high=-0.1), ValueError, r"clip_high must be in \[0, inf\)"),
    "B35 high NaN": (
        lambda: policy(objective="cispo", clip_low=0.2, clip_high=NAN),
        ValueError,
        "clip_high must be in",
    ),
    "B36 one": (lambda: policy(objective="dual_clip", dual_clip=1.0), ValueError, "dual_clip must be > 1, got 1.0"),
    "B36 NaN": (lambda: policy(objective="dual_clip", dual_clip=NAN), ValueError, "dual_clip must be > 1"),
    "B37": (
        lambda: policy(aggregation="tokenmean"),
        ValueError,
        "policy_loss: aggregation must be one of .*token-mean.* got 'tokenmean'",
    ),
    "B38": (lambda: policy(aggregation="fixed-horizon"), ValueError, "aggregation 'fixed-horizon' needs horizon"),
    "B38 groups": (
        lambda: logits_policy(aggregation="prompt-mean"),
        ValueError,
        "aggregation 'prompt-mean' needs group_ids",
    ),
    "B39": (lambda: policy(weights=A, aggregation="seq-mean-token-mean"), ValueError, "weights .* aggregation"),
    "B39 normalisers": (
        lambda: policy(weights=A, normalizers={"batch_num_tokens": 3}),
        ValueError,
        "weights .* aggregation",
    ),
    "B40 dtype": (
        lambda: policy(PACKED, PACKED, PACKED, cu_seqlens=torch.tensor([0.0, 8.0])),
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor",
    ),
    "B40 dimensions": (
        lambda: policy(PACKED, PACKED, PACKED, cu_seqlens=torch.tensor([[0, 8]])),
        ValueError,
        r"cu_seqlens has shape \(1, 2\)",
    ),
    "B40 first": (
        lambda: policy(PACKED, PACKED, PACKED, cu_seqlens=torch.tensor([1, 8])),
        ValueError,
        "cu_seqlens starts at 1, expected 0",
    ),
    "B40 last": (
        lambda: rlk.gae(PACKED, PACKED, cu_seqlens=torch.tensor([0, 7])),
        ValueError,
        "gae: cu_seqlens ends at 7, expected .* 8",
    ),
    "B40 decreasing": (
        lambda: rlk.sequence_sums(PACKED, None, torch.tensor([0, 5, 3, 8])),
        ValueError,
        "cu_seqlens decreases from 5 to 3 at entry 2",
    ),
    "B40 packed advantages": (
        lambda: policy(PACKED, PACKED, torch.zeros(2), cu_seqlens=torch.tensor([0, 5, 7])),
        ValueError,
        "cu_seqlens ends at 7",
    ),
    "B41": (lambda: policy(entropy_coef=0.1), ValueError, "entropy_coef needs entropy"),
    "B41 NaN": (lambda: logits_policy(entropy_coef=NAN), ValueError, "entropy_coef must be finite, got nan"),
    "B42 zero": (
        lambda: dpo(beta=0.0, loss_type="ipo"),
        ValueError,
        "dpo_loss: beta must be positive and finite, got 0.0",
    ),
    "B42 NaN": (lambda: dpo(beta=NAN), ValueError, "beta must be positive"),
    "B42 clip_range": (
        lambda: rlk.value_loss(A, A, A, clip_range=0.0),
        ValueError,
        "clip_range must be positive and finite, got 0.0",
    ),
    "B42 temperatures of SAPO": (lambda: policy(objective="sapo", tau_pos=0.0), ValueError, "tau_pos must be positive"),
    "B42 NaN unpaired": (
        lambda: unpaired(kl=0.0, beta=NAN),
        ValueError,
        "unpaired_preference_loss: beta must be positive and finite, got nan",
    ),
    "B42 discopop_tau": (
        lambda: dpo(loss_type="discopop", discopop_tau=0.0),
        ValueError,
        "discopop_tau must be positive and finite, got 0.0",
    ),
    "B42 weight of a class": (
        lambda: unpaired(kl=0.0, desirable_weight=-1.0),
        ValueError,
        "desirable_weight must not be negative, got -1.0",
    ),
    "B43 one half of robust": (
        lambda: dpo(loss_type="robust", label_smoothing=0.5),
        ValueError,
        "label_smoothing must not be 0.5 for loss_type 'robust'",
    ),
    "B43 zero of exo_pair": (
        lambda: dpo(loss_type="exo_pair"),
        ValueError,
        r"label_smoothing must be in \(0, 1\) for loss_type "
        r"'exo_pair', got 0.0",
    ),
    "B43 above one": (lambda: dpo(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "B43 negative": (lambda: dpo(label_smoothing=-0.1), ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
    "B44 loss_type": (
        lambda: dpo(loss_type="sigmoidal"),
        ValueError,
        "loss_type must be one of sigmoid, hinge, .*; got 'sigmoidal'",
    ),
    "B44 loss_type of a mixture": (
        lambda: dpo(loss_type=("sigmoid", "dpo")),
        ValueError,
        "loss_type must be one of .*; got 'dpo'",
    ),
    "B44 loss_type unpaired": (
        lambda: unpaired(loss_type="sigmoid"),
        ValueError,
        "loss_type must be one of kto, .*; got 'sigmoid'",
    ),
    "B44 f_divergence": (
        lambda: dpo(f_divergence="js"),
        ValueError,
        "f_divergence must be one of reverse_kl, .*; got 'js'",
    ),
    "B44 kind": (
        lambda: rlk.sft_loss(X, Y, kind="mse"),
        ValueError,
        "sft_loss: kind must be one of nll, dft, eaft, asft; got 'mse'",
    ),
    "B44 kind of log-probabilities": (
        lambda: rlk.logprobs_sft_loss(A, kind="mse"),
        ValueError,
        "kind must be one of nll, dft; got 'mse'",
    ),
    "B44 masked": (
        lambda: rlk.gae(A, A, masked="drop"),
        ValueError,
        "masked must be one of skip, zero, none; got 'drop'",
    ),
    "B44 baseline": (
        lambda: rlk.group_advantages(PACKED, PACKED.long(), baseline="median"),
        ValueError,
        "baseline must be one of .* got 'median'",
    ),
    "B44 scale": (
        lambda: rlk.group_advantages(PACKED, PACKED.long(), scale="var"),
        ValueError,
        "scale must be one of .* got 'var'",
    ),
    "B44 ratio_level": (lambda: policy(ratio_level="row"), ValueError, "ratio_level must be one of .* got 'row'"),
    "B45": (lambda: rlk.pairwise_reward_loss(*pairs(4, 5)), ValueError, "chosen has 4 pairs, rejected has 5"),
    "B45 dpo": (
        lambda: rlk.dpo_loss(*pairs(4, 5), *pairs()),
        ValueError,
        "chosen_logps has 4 pairs, rejected_logps has 5",
    ),
    "B45 lengths": (
        lambda: dpo(loss_type="sigmoid_norm", chosen_lengths=torch.ones(5)),
        ValueError,
        r"chosen_lengths has shape \(5,\), expected \(4,\)",
    ),
    "B45 masks": (
        lambda: rlk.length_desensitized_weights(torch.ones(4, 3), torch.ones(5, 3), 0.5),
        ValueError,
        r"rejected_mask has shape \(5, 3\)",
    ),
    "B45 unpaired": (
        lambda: rlk.unpaired_preference_loss(torch.zeros(4), torch.zeros(5), torch.ones(4), kl=0.0),
        ValueError,
        r"ref_logps has shape \(5,\)",
    ),
    **reward_calls.BAD,
    "B49 gamma": (lambda: rlk.gae(A, A, gamma=1.1), ValueError, r"gamma must be in \[0, 1\], got 1.1"),
    "B49 lam": (lambda: rlk.gae(A, A, lam=-0.1), ValueError, r"lam must be in \[0, 1\], got -0.1"),
    "B49 NaN": (lambda: rlk.discounted_returns(A, gamma=NAN), ValueError, r"gamma must be in \[0, 1\], got nan"),
    "B50": (lambda: rlk.gae(A, A[:, :7]), ValueError, r"values has shape \(4, 7\), expected \(4, 8\)"),
    "B50 returns": (
        lambda: rlk.value_loss(A, None, A[:, :7]),
        ValueError,
        r"returns has shape \(4, 7\), expected \(4, "
        r"8\)",
    ),
    "B51 dtype": (
        lambda: rlk.group_advantages(PACKED, PACKED),
        TypeError,
        "group_ids must be an integer tensor, got torch.float32",
    ),
    "B51 shape": (
        lambda: rlk.group_advantages(PACKED, PACKED[:7].long()),
        ValueError,
        r"group_ids has shape \(7,\), "
        r"expected \(8,\)",
    ),
    "B52": (
        lambda: in_one_process(valid_vocab=40),
        ValueError,
        r"the vocabulary shards hold 37 of 40 columns; "
        r".*\[\[0, 37, 40\]\]",
    ),
    "B52 first column": (
        lambda: in_one_process(vocab_start=3, valid_vocab=40),
        ValueError,
        "a vocabulary shard starts at 3, expected 0",
    ),
    "B52 no whole": (lambda: in_one_process(vocab_start=0), ValueError, "pass the whole vocabulary as valid_vocab"),
    "B52 no group": (
        lambda: linear(vocab_start=0, valid_vocab=37),
        ValueError,
        "vocab_start says where a shard begins; it needs process_group",
    ),
    "B53": (lambda: use_backend("cuda2").__enter__(), ValueError, "backend must be one of .*eager.* got 'cuda2'"),
    "B56": (lambda: serving("token_stats", "mps"), RuntimeError, "no backend for device mps; available: .*cpu"),
    "B57 power": (
        pow_objective,
        TypeError,
        r"objective 'mine', line 4: 'logp \*\* 2.0' is not in the language; write "
        r"multiply: x \* x",
    ),
    "B57 loop": (loop_objective, TypeError, "objective 'mine', line 4: 'for _ in range"),
    "B57 no derivative": (
        one_result_objective,
        TypeError,
        "objective 'mine', line 4: .*write a final 'return value, derivative'",
    ),
    "B57 default": (default_objective, TypeError, "objective 'mine': 'advantage' is a column and has a default"),
    "B58 double backward": (double_backward, RuntimeError, "double backward is not supported"),
    "B58 forward mode": (lambda: torch.func.jvp(logps, (X,), (X,)), RuntimeError, "forward-mode AD is not supported"),
}
for name in KNOWN:
    if absent(name) is not None:
        CASES[f"B54 {name}"] = (
            lambda name=name: use_backend(name).__enter__(),
            RuntimeError,
            f"backend '{name}' is unavailable: .+",
        )
if absent("cpu") is None:
    CASES["B55"] = (
        lambda: BACKENDS["cpu"].gae(A.half(), A.half(), None, None, 1.0, 1.0, "skip"),
        NotImplementedError,
        "not supported by backend 'cpu'",
    )

NOT_HERE = {
    **({} if any(absent(name) for name in KNOWN) else {"B54": "every backend is present here"}),
    **({} if "B55" in CASES else {"B55": "the eager backend lacks nothing, and the native one was not built here"}),
}
VALUES = ("B08", "B12")  # read by the backend
NOT_OF_A_FUNCTION = ("B54", "B55", "B56", "B57", "B58")
