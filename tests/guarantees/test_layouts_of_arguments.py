"""F07, F120: every tensor argument of every public function, in every layout that torch has, gives the bits of its
contiguous copy.
"""

import inspect

import pytest
import torch
from argument_layouts import LAYOUTS, compared
from present_backends import PRESENT
from public_calls import CALLS, call_with, data, tensor_arguments
from reference import same_bits

import rlkernels as rlk

# What a public parameter takes. A new one has to be entered here: a tensor has to occur in CALLS.
TENSORS = set(
    """
    logits targets vocab_mask ref_logits hidden weight bias old_logprobs advantages mask weights ref_logprobs
    cu_seqlens logprobs entropy values old_values returns rewards bootstrap_values chosen_logps rejected_logps
    ref_chosen_logps ref_rejected_logps chosen_lengths rejected_lengths pair_weights logps ref_logps desirable
    kl_logps ref_kl_logps chosen_mask rejected_mask sample_weights chosen rejected margin attention_mask x group_ids
    lengths rollout_ids group_tokens group_rows spans temperature ref_hidden ref_weight ref_bias teacher_logits
    teacher_hidden teacher_weight teacher_bias chosen_rewards rejected_rewards gold_logps gold_lengths
    log_sum_sq_probs input_ids labels reward_token_ids scores step_scores turn_ends terminated truncated dones
    last_dones last_values next_values reward_weights row_advantages is_last_step trajectory_ids step_rewards
    step_ends episode_rewards anchor_ids token_rewards sequences rollout_logprobs correction
""".split()
)
NUMBERS_OR_TENSORS = set("kl delta lam turn_lam batch_num_tokens num_sequences horizon".split())
OTHERS = set(
    """
    ignore_index inplace_backward outputs softcap logit_scale logits_dtype chunk_tokens logits_budget
    max_live_tokens valid_vocab process_group vocab_start objective aggregation kl_coef entropy_coef ratio_level
    normalizers return_metrics params clip_range kind gamma masked baseline scale eps unbiased shift_mean eps_mode
    dim beta loss_type loss_weights label_smoothing reference_free f_divergence alpha length_normalized simpo_gamma
    alphapo_alpha discopop_tau cpo_alpha desirable_weight undesirable_weight ld_alpha center_coef options
    count_empty_rows dp_size dtype mode length shift teacher_topk teacher_softcap teacher_logit_scale turn_gamma
    rho_max c_max advantage_rho_max time_dim dones_at singleton step_weight alignment score_clip placement eos_id
    max_length buffer factor coef low high reduction positions pad_id prompt_length num_padding_at_beginning
    allow_first_difference placeholder_id diff_clamp value_clamp gradient ratio_weighted ratio_detached ratio_cap
    stop_gradient grid tolerance tensors pad_to num_tokens fill padding moments parts level gate gate_level
    batch_normalize batch_mean nan_ratio rules threshold count normalize_by_weight eaft_alpha asft_alpha z_loss_coef
    dpop_lambda rpo_eta tpo_alpha num_pairs num_chosen_tokens num_gold_tokens kl_group fraction top_entropy_fraction
    mask_low mask_high clamp_low clamp_high log_ratio_clamp ratio_denominator log_ratio_sq_coef
""".split()
)
FURTHER = {"aggregate": (rlk.token_weights,)}
"""Functions whose keywords are those of others."""
KL_IS_A_NAME = {"assemble_rewards", "token_stats", "policy_loss", "logits_policy_loss", "linear_policy_loss"}

ONE_NUMBER = {"vtrace": {"lam"}, "rollout_gae": {"lam"}}
"""Arguments that a function takes as a number alone."""


def parameters(function):
    found = set(inspect.signature(getattr(rlk, function)).parameters)
    for other in FURTHER.get(function, ()):
        found |= {name for name, p in inspect.signature(other).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return found - ({"kl"} if function in KL_IS_A_NAME else set()) - ONE_NUMBER.get(function, set())


FUNCTIONS = sorted({name.split(" ")[0] for name in CALLS})
PLACES = [(name, argument) for name in CALLS for argument, _ in tensor_arguments(name)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_tensor_argument_of_a_public_function_occurs_in_a_call(function):
    found = parameters(function)
    assert found <= TENSORS | NUMBERS_OR_TENSORS | OTHERS, (
        "say in this file what the new argument is, and call it with one where it is a tensor"
    )
    passed = {argument for name, argument in PLACES if name.split(" ")[0] == function}
    assert found & (TENSORS | NUMBERS_OR_TENSORS) <= passed


def assert_same(got, expected, backend, what):
    assert len(got) == len(expected), what
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        if backend == "eager" and a.is_floating_point():  # torch's own reductions follow strides
            torch.testing.assert_close(
                a, b, rtol=2e-5, atol=2e-5, equal_nan=True, msg=lambda m, k=k: f"{what}: result {k}: {m}"
            )
        else:
            assert same_bits(a, b), f"{what}: result {k}: {a} against {b}"


@pytest.mark.fault(7, 120)
@pytest.mark.parametrize("name,argument", PLACES, ids=lambda x: x.replace(" ", "-"))
@pytest.mark.parametrize("backend", PRESENT)
def test_every_layout_of_every_argument_gives_the_bits_of_its_contiguous_copy(name, argument, backend):
    d, tried = data(), 0
    with rlk.use_backend(backend):
        for layout in LAYOUTS:
            got, expected, times = compared(call_with, name, d, layout, only=argument)
            tried += times
            assert_same(got, expected, backend, f"{argument} of {name}, {layout}")
    assert tried >= 4


# One sequence, one token, one pair: a dimension of one element may have any stride.
ONE = {"one sequence": (1, 5), "one token": (3, 1), "one token of one sequence": (1, 1)}


@pytest.mark.fault(120)
@pytest.mark.parametrize(
    "name", [name for name in CALLS if " " not in name or name.endswith(("of sequences", "of weights", "of sums"))]
)
@pytest.mark.parametrize("shape", ONE)
@pytest.mark.parametrize("backend", PRESENT)
def test_a_dimension_of_one_element_may_have_any_stride(name, shape, backend):
    rows, length = ONE[shape]
    d = {
        k: x[:rows, :length] if x.dim() > 1 and x.shape[:2] == (3, 5) else x[:rows] if k in ("per_row", "rows") else x
        for k, x in data().items()
    }
    d = {k: x.contiguous() for k, x in d.items()}
    d["cu"], d["answers"] = torch.tensor([0, rows * length]), torch.tensor([0, 0, 0, 0, rows * length])
    with rlk.use_backend(backend):
        try:
            call_with(name, d, lambda argument, x: x)
        except ValueError:
            return  # a call that has three sequences in it
        got, expected, _ = compared(call_with, name, d, "strides of single elements")
    assert_same(got, expected, backend, f"{name}, {shape}")
