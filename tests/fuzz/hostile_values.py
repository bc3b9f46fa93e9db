"""Good arguments by their names, and what may come in their place."""

import math

import numpy as np
import torch
from torch.testing._internal.two_tensor import TwoTensor

from fuzz.draws import INF, NAN

B, L, V, H = 4, 5, 7, 4
PER_TOKEN = {
    "logprobs",
    "old_logprobs",
    "advantages",
    "ref_logprobs",
    "weights",
    "entropy",
    "values",
    "old_values",
    "returns",
    "rewards",
    "sample_weights",
    "x",
}
MASKS = {"mask", "attention_mask", "chosen_mask", "rejected_mask"}
TRAINED = {
    "logits",
    "hidden",
    "weight",
    "bias",
    "logprobs",
    "entropy",
    "values",
    "chosen_logps",
    "rejected_logps",
    "logps",
    "chosen",
    "rejected",
    "margin",
    "x",
}
PER_PAIR = {
    "chosen_rewards",
    "rejected_rewards",
    "gold_logps",
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "pair_weights",
}


def good(draw, function, name, packed):
    """An argument that fits the others."""
    shape = (B * L,) if packed else (B, L)
    if function in ("aggregate", "sequence_sums", "sequence_means") and name == "values":
        return draw.normal(shape, torch.float32)
    if name in ("logits", "ref_logits"):
        return draw.normal((*shape, V), torch.float32)
    if name == "hidden":
        return draw.normal((*shape, H), torch.float32)
    if name == "weight":
        return draw.normal((1 if function == "reward_scores" else V, H), torch.float32)
    if name == "bias":
        return draw.normal((1 if function == "reward_scores" else V,), torch.float32)
    if name == "targets":
        return draw.integers(0, V, shape)
    if name in MASKS:
        return draw.coins(shape if name in ("mask", "attention_mask") else (B, L), 0.7)
    if name == "vocab_mask":
        return draw.coins((V,), 0.8)
    if name == "cu_seqlens":
        return torch.tensor([0, 5, 7, 12, 20])
    if name == "temperature":
        return draw.uniform(shape, 0.5, 1.5, torch.float32)
    if name == "group_ids":
        return draw.integers(0, 3, (B,))
    if name == "spans":
        return draw.integers(0, 4, (2, 2))
    if name in PER_TOKEN and not (function == "group_advantages" or function == "broadcast_to_tokens"):
        return draw.normal(shape, torch.float32)
    pairs = B // 2 if function == "linear_dpo_loss" and name in PER_PAIR else B
    if "lengths" in name:
        return draw.integers(1, 9, (pairs,))
    if name == "desirable":
        return draw.coins((B,), 0.5)
    return -draw.uniform((pairs,), 0.1, 3.0, torch.float32)


NUMBERS = (
    0,
    -1,
    1,
    1.5,
    1e300,
    1e-40,
    NAN,
    INF,
    -INF,
    2**70,
    True,
    None,
    "x",
    (),
    [],
    object(),
    np.float32(0.5),
    np.int64(3),
    1j,
)
IDS = [torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1]), torch.tensor([0.0, 1, 2, 3])]
NORMALIZERS = [
    None,
    {},
    {"horizon": 3},
    {"horizon": 0},
    {"horizon": -1},
    {"horizon": NAN},
    {"group_ids": IDS[0]},
    {"group_ids": IDS[1]},
    {"rollout_ids": IDS[2]},
    {"num_sequences": torch.tensor(3)},
    {"num_sequences": torch.tensor([3])},
    {"unknown": 1},
    {"dtype": torch.int64},
    {"cu_seqlens": torch.tensor([0, 20])},
    {"batch_num_tokens": "x"},
    {"dp_size": INF},
    {"scale": -1.0},
    [],
]
KINDS_OF_NAMES = {
    "aggregation": (
        "token-mean",
        "seq-mean-token-mean",
        "token-sum",
        "fixed-horizon",
        "prompt-mean",
        "seq-mean",
        "group-mean",
        "mean",
    ),
    "mode": ("token-mean", "seq-mean", "fixed-horizon", "rollout-mean", "mean"),
    "kl": ("k1", "k2", "k3", "exact", "k4"),
    "objective": ("ppo_clip", "cispo", "sapo", "dual_clip", "reinforce", "k3", "nll", "ppo"),
    "ratio_level": ("token", "sequence", "sequence_token", "sequence_sum", "row"),
    "kind": ("nll", "dft", "eaft", "ce"),
    "masked": ("skip", "zero", "none", "all"),
    "baseline": ("mean", "leave-one-out", "length-mean", "batch-mean", "median"),
    "scale": ("std", "batch-std", "mean", "max"),
    "f_divergence": ("reverse_kl", "js_divergence", "alpha_divergence", "kl"),
    "eps_mode": ("add", "clamp", "max"),
    "loss_type": (
        "sigmoid",
        "ipo",
        "orpo",
        "sft",
        "aot",
        "exo_pair",
        "kto",
        "bco",
        "apo_zero_unpaired",
        "kto_paired_batch",
        "dpo",
        ("sigmoid", "sft"),
        (),
    ),
}
"""The last of each is no name that anything has."""
OTHERS = {
    "outputs": (
        (),
        ("entropy",),
        ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs"),
        "entropy",
        ("entropi",),
        [1],
    ),
    "normalizers": NORMALIZERS,
    "logits_dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, "float32"),
    "dtype": (torch.float32, torch.float64, torch.int64, 3),
    "loss_weights": ((1.0,), (1.0, 2.0), 1.0, (NAN,), ("a",)),
    "dim": (None, 0, -1, 1, 5, "x", (0, 1)),
    "process_group": (None, "x", 3),
    "kl_group": (None, "x", 3),
    "length": (0, 1, 5, -1, 2.5, "5"),
    "ignore_index": (-100, 0, 3, 2**31, 2**62, -(2**63), 2**63, 1.0, True, "x"),
    "vocab_start": (None, 0, 3, -1),
    "max_live_tokens": (1, 100, 0, -1, 1.5),
    "chunk_tokens": (1, 3, 0, -1, 1.5, 2**62),
    "logits_budget": (1, 10**6, 0, -1, 1.5),
    "valid_vocab": (1, 5, V, V + 1, 0, -1),
}
FLAGS = {
    "inplace_backward",
    "return_metrics",
    "reference_free",
    "length_normalized",
    "unbiased",
    "shift_mean",
    "shift",
    "count_empty_rows",
    "normalize_by_weight",
}
USUAL = {
    "temperature": 0.7,
    "beta": 0.1,
    "gamma": 0.9,
    "lam": 0.9,
    "eps": 1e-6,
    "horizon": 3,
    "ld_alpha": 0.5,
    "kl": 0.1,
    "delta": 0.1,
    "dp_size": 1,
    "scale": 1.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "clip_range": 0.2,
    "kl_coef": 0.1,
    "entropy_coef": 0.1,
    "label_smoothing": 0.1,
    "num_sequences": 2,
    "batch_num_tokens": 3,
    "z_loss_coef": 0.1,
    "rpo_eta": 1.0,
    "dpop_lambda": 5.0,
    "num_pairs": 9,
    "count": 1,
    "reduction": "sum",
}
HIDDEN = {
    "policy_loss": ("clip_low", "clip_high"),
    "logits_policy_loss": ("clip_low", "clip_high"),
    "linear_policy_loss": ("clip_low", "clip_high"),
    "aggregate": ("horizon", "num_sequences", "group_ids"),
}
"""Options behind ``**``, which no signature shows."""
OFTEN = {"ref_chosen_logps", "ref_rejected_logps", "cu_seqlens", "return_metrics"}
MANY = {"linear_dpo_loss", "linear_unpaired_preference_loss"}
"""Functions with so many keywords that most calls would be refused for two that exclude each other: those that are not
in OFTEN are given seldom.
"""


def option(draw, function, name):
    """A usual value, or with a chance of a third anything."""
    if name in FLAGS:
        return draw.choice((True, False, False, None, 1))
    known = KINDS_OF_NAMES.get(name, ())
    if name == "scale" and function != "group_advantages" or name == "kl" and "unpaired" in function:
        known = ()
    known = known or OTHERS.get(name, ())
    if known:
        return draw.choice(known) if draw.flag(0.8) else draw.choice(NUMBERS)
    return draw.choice(NUMBERS) if draw.flag(0.35) or name not in USUAL else USUAL[name]


def _one_element(draw, x, values):
    y = x.clone()
    if y.numel():
        y.view(-1)[draw.randrange(y.numel())] = draw.choice(values)
    return y


class Odd(torch.Tensor):
    """A subclass that adds nothing."""


DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
SHAPES = {
    "a dimension more": lambda draw, x: x.unsqueeze(draw.randrange(x.dim() + 1)),
    "one less": lambda draw, x: x[..., :-1] if x.dim() else x,
    "nothing": lambda draw, x: x[:0] if x.dim() else x,
    "no element": lambda draw, x: x.new_empty((0,) * max(1, x.dim())),
    "twice": lambda draw, x: torch.cat([x, x]) if x.dim() else x,
    "expanded": lambda draw, x: x.expand((2, *x.shape)),
    "flat": lambda draw, x: x.reshape(-1),
    "a scalar": lambda draw, x: x.flatten()[0] if x.numel() else x,
    "a column": lambda draw, x: x.reshape(-1, 1),
    "transposed": lambda draw, x: x.transpose(0, -1) if x.dim() else x,
}
LAYOUTS = {
    "every other": lambda draw, x: torch.stack([x, x], -1)[..., 0],
    "laid out": lambda draw, x: draw.laid_out(x),
    "one element everywhere": lambda draw, x: x.as_strided(x.shape, [0] * x.dim()) if x.numel() else x,
    "transposed in memory": lambda draw, x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    "channels last": lambda draw, x: (
        x.reshape(1, 1, *x.shape).contiguous(memory_format=torch.channels_last)[0, 0] if x.dim() == 2 else x
    ),
    "negated in passing": lambda draw, x: (
        torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype in (torch.float32, torch.float64) else x
    ),
    "conjugated": lambda draw, x: torch.complex(x, x).conj() if x.dtype in (torch.float32, torch.float64) else x,
    "a parameter": lambda draw, x: torch.nn.Parameter(x) if x.is_floating_point() else x,
    "trained": lambda draw, x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "a view of a parameter": lambda draw, x: torch.nn.Parameter(x).view(x.shape) if x.is_floating_point() else x,
}
KINDS = {
    "None": lambda draw, x: None,
    "a list": lambda draw, x: x.tolist(),
    "an array": lambda draw, x: x.numpy(),
    "a number": lambda draw, x: x.flatten()[0].item() if x.numel() else 1.0,
    "another dtype": lambda draw, x: x.to(draw.choice(DTYPES)),
    "on meta": lambda draw, x: x.to("meta"),
    "sparse": lambda draw, x: x.to_sparse() if x.dim() else x,
    "compressed": lambda draw, x: x.to_sparse_csr() if x.dim() == 2 else x,
    "for oneDNN": lambda draw, x: x.to_mkldnn() if x.dtype == torch.float32 and x.numel() else x,
    "quantised": lambda draw, x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8) if x.dtype == torch.float32 else x,
    "nested": lambda draw, x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 and len(x) else x,
    "jagged": lambda draw, x: torch.nested.nested_tensor(list(x), layout=torch.jagged) if x.dim() > 1 and len(x) else x,
    "a subclass": lambda draw, x: TwoTensor(x, x.clone()),
    "a subclass of no use": lambda draw, x: x.as_subclass(Odd),
}
VALUES = {
    "one odd number": lambda draw, x: (
        _one_element(draw, x, (NAN, INF, -INF, 3e38, -3e38, 1e-45, 0.0)) if x.is_floating_point() else x
    ),
    "one odd id": lambda draw, x: (
        _one_element(draw, x, (-1, -100, V, 7, 1000, 2**31, 2**62, -(2**63), 2**63 - 1))
        if x.dtype == torch.int64
        else x
    ),
    "all the same": lambda draw, x: (
        torch.full_like(x, draw.choice((0.0, NAN, INF, -INF, -1.0, math.pi)))
        if x.is_floating_point()
        else torch.zeros_like(x)
    ),
    "backwards": lambda draw, x: x.flip(0) if x.dim() else x,
}
HOSTILE = {**SHAPES, **LAYOUTS, **KINDS, **VALUES}
"""Name -> what stands in for a good tensor."""
