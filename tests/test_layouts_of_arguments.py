"""F07, F120: every tensor argument of every public function, in every layout that torch has, gives the bits of its contiguous copy."""
import inspect

import pytest
import torch
from present_backends import PRESENT
from public_calls import CALLS, call_with, data, tensor_arguments
from reference import same_bits

import rlkernels as rlk
from rlkernels import head, preferences, unpaired

# What a public parameter takes. A new one has to be entered here: a tensor has to occur in CALLS.
TENSORS = set("""
    logits targets vocab_mask ref_logits hidden weight bias old_logprobs advantages mask weights ref_logprobs cu_seqlens logprobs entropy values old_values
    returns rewards bootstrap_values chosen_logps rejected_logps ref_chosen_logps ref_rejected_logps chosen_lengths rejected_lengths pair_weights logps
    ref_logps desirable kl_logps ref_kl_logps chosen_mask rejected_mask sample_weights chosen rejected margin attention_mask x group_ids lengths
    rollout_ids spans temperature
""".split())
NUMBERS_OR_TENSORS = set("kl delta batch_num_tokens num_sequences horizon".split())
OTHERS = set("""
    ignore_index inplace_backward outputs softcap logit_scale logits_dtype chunk_tokens logits_budget max_live_tokens valid_vocab process_group vocab_start
    objective aggregation kl_coef entropy_coef ratio_level normalizers return_metrics params clip_range kind gamma lam masked baseline scale eps unbiased
    shift_mean eps_mode dim beta loss_type loss_weights label_smoothing reference_free f_divergence alpha length_normalized simpo_gamma alphapo_alpha
    discopop_tau cpo_alpha desirable_weight undesirable_weight ld_alpha center_coef options count_empty_rows dp_size dtype mode length shift
""".split())
FURTHER = {"linear_dpo_loss": (head.head, preferences.preference_options), "linear_unpaired_preference_loss": (head.head, unpaired.unpaired_options),
           "aggregate": (rlk.token_weights,)}
"""Functions whose keywords are those of others."""
KL_IS_A_NAME = {"token_stats", "policy_loss", "logits_policy_loss", "linear_policy_loss"}


def parameters(function):
    found = set(inspect.signature(getattr(rlk, function)).parameters)
    for other in FURTHER.get(function, ()):
        found |= {name for name, p in inspect.signature(other).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return found - ({"kl"} if function in KL_IS_A_NAME else set())


FUNCTIONS = sorted({name.split(" ")[0] for name in CALLS})
PLACES = [(name, argument) for name in CALLS for argument, _ in tensor_arguments(name)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_tensor_argument_of_a_public_function_occurs_in_a_call(function):
    found = parameters(function)
    assert found <= TENSORS | NUMBERS_OR_TENSORS | OTHERS, "say in this file what the new argument is, and call it with one where it is a tensor"
    passed = {argument for name, argument in PLACES if name.split(" ")[0] == function}
    assert found & (TENSORS | NUMBERS_OR_TENSORS) <= passed


def wrong(x):
    """What lies beside the numbers of a tensor: it shows where it is read."""
    return float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else 10**6


def apart(x):
    """Two elements, or two rows, never side by side."""
    parent = torch.full([2 * n + 1 for n in x.shape], wrong(x), dtype=x.dtype)
    view = parent[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def every_other(x):
    parent = torch.full((*x.shape, 2), wrong(x), dtype=x.dtype)
    parent[..., 0] = x
    return parent[..., 0]


def offset(x):
    storage = torch.full((x.numel() + 3,), wrong(x), dtype=x.dtype)
    storage[1:-2] = x.reshape(-1)
    return storage[1:-2].view(x.shape)


def overlapping(x):
    """Rows that begin one element after each other."""
    sizes = [max(n, 1) for n in x.shape]
    return x.reshape(-1)[:1 + sum(n - 1 for n in sizes)].clone().as_strided(x.shape, (1,) * x.dim())


def long_strides_of_single_elements(x):
    strides = [7777 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return x.clone().as_strided(x.shape, strides)


LAYOUTS = {
    "every element apart": apart,
    "column of a table": every_other,
    "storage offset": offset,
    "dimensions reversed in memory": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))) if x.dim() > 1 else None,
    "negative bit": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else None,
    "strides of single elements": lambda x: long_strides_of_single_elements(x) if 1 in x.shape else None,
    # Those that change the numbers.
    "expanded from one row": lambda x: x[:1].clone().expand(x.shape) if x.dim() else None,
    "expanded from one element": lambda x: x.reshape(-1)[:1].clone().view((1,) * x.dim()).expand(x.shape) if x.dim() else None,
    "overlapping": lambda x: overlapping(x) if x.dim() > 1 else None,
}
ORDERED = {"cu_seqlens", "spans"}  # no offsets are alike


def laid_out(layout, argument, x):
    """None where the layout does not exist for this argument."""
    if argument in ORDERED and layout in ("expanded from one row", "expanded from one element", "overlapping"):
        return None
    return LAYOUTS[layout](x)


def assert_same(got, expected, backend, what):
    assert len(got) == len(expected), what
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        if backend == "eager" and a.is_floating_point():  # torch's own reductions follow strides
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True, msg=lambda m, k=k: f"{what}: result {k}: {m}")
        else:
            assert same_bits(a, b), f"{what}: result {k}: {a} against {b}"


@pytest.mark.parametrize("name,argument", PLACES, ids=lambda x: x.replace(" ", "-"))
@pytest.mark.parametrize("backend", PRESENT)
def test_F07_F120_every_layout_of_every_argument_gives_the_bits_of_its_contiguous_copy(name, argument, backend):
    d, tried = data(), 0
    with rlk.use_backend(backend):
        for layout in LAYOUTS:
            def change(key, x, layout=layout, dense=False):
                y = laid_out(layout, key, x) if key == argument else x
                if y is None:
                    return x
                nonlocal tried
                tried += not dense and key == argument
                return y.resolve_neg().clone(memory_format=torch.contiguous_format) if dense and key == argument else y

            got, expected = call_with(name, d, change), call_with(name, d, lambda key, x, c=change: c(key, x, dense=True))
            assert_same(got, expected, backend, f"{argument} of {name}, {layout}")
    assert tried >= 2
