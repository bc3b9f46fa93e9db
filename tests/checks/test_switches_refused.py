"""Switches, names and dicts of another type: every refusal names its function and its argument."""

import inspect

import numpy
import pytest
import torch

import rlkernels as rlk

NOT_SWITCHES = {
    "text": "False",
    "one": 1,
    "nothing": None,
    "array": numpy.ones(2, dtype=bool),
    "tensor": torch.tensor([True, False]),
    "a list": [],
}
DRAW = torch.Generator().manual_seed(0)
T, X, Y, H, W = (
    torch.randn(2, 3, generator=DRAW),
    torch.randn(2, 3, 5, generator=DRAW),
    torch.randint(5, (2, 3), generator=DRAW),
    torch.randn(2, 3, 4, generator=DRAW),
    torch.randn(5, 4, generator=DRAW),
)
GOOD = torch.tensor([True, False])
CALLS = {
    "policy_loss": (T, T, T),
    "logits_policy_loss": (X, Y, T, T),
    "linear_policy_loss": (H, W, Y, T, T),
    "value_loss": (T, T, T),
    "sft_loss": (X, Y),
    "logprobs_sft_loss": (T,),
    "linear_sft_loss": (H, W, Y),
    "divergence_loss": (X, X),
    "linear_distillation_loss": (H, W, H, W),
    "dpo_loss": (T[0], T[1], T[0], T[1]),
    "linear_dpo_loss": (H, W, Y),
    "unpaired_preference_loss": (T[:, 0], T[:, 1], GOOD),
    "linear_unpaired_preference_loss": (H, W, Y, T[:, 0], GOOD),
    "pairwise_reward_loss": (T, T),
    "process_reward_loss": (X, Y),
    "rank_list_loss": (T,),
    "span_reward_loss": (T, torch.tensor([[1, 2, 3], [1, 4, 0]]), 0),
    "token_stats": (X, Y),
    "token_logprobs": (X, Y),
    "token_weights": (torch.ones(2, 3),),
    "aggregate": (T,),
    "spans_to_mask": ([[1, 2]], 5),
}
NEEDED = {
    "unpaired_preference_loss": {"kl": 0.1},
    "linear_unpaired_preference_loss": {"kl": 0.1},
    "linear_dpo_loss": {"ref_chosen_logps": T[0, :1], "ref_rejected_logps": T[1, :1]},
}
SWITCHES = [
    (name, argument)
    for name in CALLS
    for argument, p in inspect.signature(getattr(rlk, name)).parameters.items()
    if p.default is True or p.default is False
]
NAMES = [
    (name, argument)
    for name in CALLS
    for argument in ("aggregation", "mode", "reduction", "ratio_level", "ratio_denominator", "kind", "loss_type")
    if argument in inspect.signature(getattr(rlk, name)).parameters
]


def called(name, **options):
    return getattr(rlk, name)(*CALLS[name], **NEEDED.get(name, {}), **options)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_this_file_are_good(name):
    called(name)


@pytest.mark.parametrize("what", NOT_SWITCHES)
@pytest.mark.parametrize(("name", "argument"), SWITCHES)
def test_a_switch_is_true_or_false(name, argument, what):
    """A config file may hold the text "False", which is true in Python."""
    with pytest.raises(TypeError, match=f"^{name}: {argument} must be True or False"):
        called(name, **{argument: NOT_SWITCHES[what]})


@pytest.mark.parametrize("name", ["policy_loss", "dpo_loss", "sft_loss"])
def test_a_switch_of_numpy_is_a_switch(name):
    assert called(name, return_metrics=numpy.bool_(True))[1].keys() == called(name, return_metrics=True)[1].keys()
    assert called(name, return_metrics=numpy.bool_(False)).dim() == 0


@pytest.mark.parametrize("x", [numpy.ones(2), torch.ones(2), ["token-mean"], 3], ids=["array", "tensor", "list", "int"])
@pytest.mark.parametrize(("name", "argument"), NAMES)
def test_a_name_is_a_text(name, argument, x):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: .*{argument}"):
        called(name, **{argument: x})


@pytest.mark.parametrize("x", [numpy.ones(2), torch.ones(2), [1.0], False], ids=["array", "tensor", "list", "False"])
@pytest.mark.parametrize("more", [{}, {"weights": T}, {"reduction": "none"}], ids=["", "weights", "none"])
@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "sft_loss", "logprobs_sft_loss", "divergence_loss"])
def test_normalizers_are_a_dict(name, more, x):
    with pytest.raises(TypeError, match=f"^{name}: normalizers must be a dict"):
        called(name, normalizers=x, **more)


def test_a_grid_is_a_dict_and_a_dtype_is_a_dtype():
    with pytest.raises(TypeError, match="^check_objective: grid must be a dict of numbers by the names of columns"):
        rlk.check_objective("cispo", grid=[1.0])
    with pytest.raises(TypeError, match="^aggregate: dtype must be one of"):
        rlk.aggregate(T, dtype=numpy.ones(2))
    with pytest.raises(TypeError, match="^linear_sft_loss: logits_dtype must be floating"):
        rlk.linear_sft_loss(H, W, Y, logits_dtype=numpy.ones(2))
