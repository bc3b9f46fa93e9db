"""Every function of a head spells its keywords, with the defaults that the same keywords have elsewhere."""

import inspect

import pytest
import torch

import rlkernels as rlk
from rlkernels.linear.head import OPERANDS, TENSORS, HeadOptions, LinearHead
from rlkernels.linear.vocab_parallel import Shard

COUNTERPARTS = {
    "linear_token_logprobs": None,
    "linear_token_stats": "token_stats",
    "linear_policy_loss": "policy_loss",
    "linear_sft_loss": "logprobs_sft_loss",
    "linear_distillation_loss": "divergence_loss",
    "linear_dpo_loss": "dpo_loss",
    "linear_unpaired_preference_loss": "unpaired_preference_loss",
}
"""Each function, and the one whose keywords it has besides those of the head."""
NO_TARGETS = {"ignore_index"}
"""Options of the head that ``linear_distillation_loss`` has no use for."""
MADE_FROM_THE_HEAD = {"entropy"}
OF_LOGITS = {"temperature", "ignore_index", "vocab_mask", "ref_logits", "kl", "inplace_backward"}


def keywords(function):
    parameters = inspect.signature(getattr(rlk, function)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_these_are_all_functions_of_a_head():
    assert set(COUNTERPARTS) == {name for name in rlk.__all__ if name.startswith("linear_")}


@pytest.mark.parametrize("function", COUNTERPARTS)
def test_every_option_of_the_head_is_spelled_with_the_same_default(function):
    options = keywords("linear_token_logprobs")
    assert list(options) == list(HeadOptions.__annotations__) and len(options) == 13
    found = keywords(function)
    if function == "linear_distillation_loss":
        options = {name: default for name, default in options.items() if name not in NO_TARGETS}
        assert not set(found) & NO_TARGETS
    assert {name: found.get(name, "absent") for name in options} == options
    assert [name for name in found if name in options] == list(options)  # in one order too


@pytest.mark.parametrize("function", [name for name, other in COUNTERPARTS.items() if other])
def test_the_other_keywords_are_those_of_the_same_loss_without_a_head(function):
    theirs = keywords(COUNTERPARTS[function])
    of_logits = OF_LOGITS if function in ("linear_token_stats", "linear_distillation_loss") else set()
    of_logits |= {"ref_logits"} if function == "linear_policy_loss" else set()
    theirs = {name: default for name, default in theirs.items() if name not in MADE_FROM_THE_HEAD | of_logits}
    ours = {name: x for name, x in keywords(function).items() if name not in HeadOptions.__annotations__}
    of_pairs = {"ref_chosen_logps": None, "ref_rejected_logps": None, "ld_alpha": 1.0}
    references = of_pairs if function == "linear_dpo_loss" else {}
    if function == "linear_policy_loss":
        references |= {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
    if function == "linear_sft_loss":
        references = {"z_loss_coef": 0.0, "asft_alpha": None, "ref_hidden": None, "ref_weight": None, "ref_bias": None}
    packing = {"cu_seqlens": None} if function.endswith(("dpo_loss", "unpaired_preference_loss")) else {}
    teacher = (
        {"teacher_bias": None, "teacher_softcap": None, "teacher_logit_scale": 1.0}
        if function == "linear_distillation_loss"
        else {}
    )
    assert ours == {**theirs, **references, **packing, **teacher}


@pytest.mark.parametrize("function", COUNTERPARTS)
def test_nothing_hides_behind_a_double_star_but_the_parameters_of_an_objective(function):
    parameters = inspect.signature(getattr(rlk, function)).parameters.values()
    hidden = [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert hidden == (["params"] if function in ("linear_policy_loss", "linear_dpo_loss") else [])


def test_the_schema_of_an_op_has_the_operands_of_a_head_in_order():
    """A head that goes through an op and back is the same one, with a softcap, a shard and a bound and without."""
    tensors = torch.ones(3, 2), torch.ones(5, 2), torch.ones(5), torch.zeros(3, dtype=torch.long), torch.ones(3)
    mask = torch.ones(5, dtype=torch.bool)
    heads = (
        LinearHead(
            *tensors, mask, 30.0, 0.9, -100, torch.float32, 16, True, 7, Shard("0", 5, 5, 10), "linear_token_stats"
        ),
        LinearHead(*tensors, None, None, -1.0, 2, torch.bfloat16, 4, False, None, None, "linear_token_logprobs"),
    )
    for head in heads:
        flat = head.flatten()
        assert len(flat) == len(OPERANDS.split(", "))
        assert all(x is None or isinstance(x, torch.Tensor) for x in flat[:TENSORS])
        assert not any(isinstance(x, torch.Tensor) for x in flat[TENSORS:])
        back = LinearHead.unflatten(list(flat))
        assert all(x is y if isinstance(x, torch.Tensor) else x == y for x, y in zip(back, head, strict=True))
        for argument, x in zip(OPERANDS.split(", "), flat, strict=True):
            kind, name = argument.split()
            kinds = {"Tensor": torch.Tensor, "bool": bool, "int": int, "str": str, "ScalarType": torch.dtype}
            known = kinds[kind.rstrip("?")]
            assert isinstance(x, known) or x is None and kind.endswith("?"), name
