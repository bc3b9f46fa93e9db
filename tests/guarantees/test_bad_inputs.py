"""Bad inputs, B01 to B58: each raises the type and names the argument, what came and what is expected."""

import re

import public_calls
import pytest
import torch
from bad_calls import A, dpo, linear, logits_policy, logps, pairs, policy, stats
from bad_inputs import CASES, NOT_HERE, NOT_OF_A_FUNCTION, VALUES

import rlkernels as rlk
from rlkernels.backends import DEVICES, absent, use_backend


@pytest.mark.fault(14, 90)
@pytest.mark.parametrize("case", CASES, ids=[name.replace(" ", "-") for name in CASES])
def test_bad_input_is_named(case):
    function, error, message = CASES[case]
    with pytest.raises(error, match=message) as caught:
        function()
    assert type(caught.value) is error
    if case[:3] not in NOT_OF_A_FUNCTION:
        assert re.match(r"[a-z_]+: ", str(caught.value)), (
            f"the message does not start with the function's name: {caught.value}"
        )


def test_each_row_of_the_table_is_tested_or_excused():
    numbers = {f"B{n:02}" for n in range(1, 59)}
    tested = {name[:3] for name in CASES}
    assert tested | set(NOT_HERE) == numbers
    assert not tested & set(NOT_HERE)


def test_bad_values_are_met_by_every_backend_and_name_the_row():
    for name in DEVICES["cpu"]:
        if absent(name) is None:
            with use_backend(name):
                for case in CASES:
                    if case[:3] in VALUES:
                        function, error, message = CASES[case]
                        with pytest.raises(error, match=message):
                            function()


# A value of PPO is looked at only with a clip range, which its packed call is without.
NOT_LOOKED_AT = (("value_loss", "old_values"),)
NOT_TENSORS = {"None": lambda x: None, "text": lambda x: "x", "an-array": lambda x: x.detach().numpy()}


@pytest.mark.parametrize("kind", NOT_TENSORS)
@pytest.mark.parametrize("case", public_calls.CALLS)
def test_what_is_no_tensor_is_taken_or_refused_by_name(case, kind):
    seen = dict.fromkeys(public_calls.tensor_arguments_of(case))
    for place in seen:
        function, argument = place
        try:
            with public_calls.arguments(
                lambda *at, place=place: NOT_TENSORS[kind](at[2]) if at[:2] == place else at[2]
            ):
                public_calls.CALLS[case](public_calls.data())
        except (TypeError, ValueError) as error:
            assert str(error).startswith(f"{function}: "), f"{argument}: {error}"
            # A call that lacks an argument may say what the others expected without it.
            assert kind == "None" or argument.split("[")[0] in str(error), f"{argument}: {error}"
        else:
            assert kind != "text" or place in NOT_LOOKED_AT, f"{argument} may be text"


@pytest.mark.fault(73)
def test_shapes_that_would_broadcast_are_refused_with_both_shapes():
    column, row = torch.zeros(8, 1), torch.zeros(8)
    for name, arguments in {"advantages": (row, row, column), "old_logprobs": (row, column, row)}.items():
        with pytest.raises(ValueError, match=rf"{name} has shape \(8, 1\), expected \(8,\)"):
            policy(*arguments)
    with pytest.raises(ValueError, match=r"mask has shape \(8, 1\), expected \(8,\)"):
        policy(row, row, row, column)
    with pytest.raises(ValueError, match=r"chosen_logps has .*\(8, 1\)"):
        rlk.dpo_loss(column, row, reference_free=True)
    with pytest.raises(ValueError, match=r"ref_chosen_logps has shape \(8, 1\), expected \(8,\)"):
        rlk.dpo_loss(row, row, column, row)
    with pytest.raises(ValueError, match=r"returns has shape \(8, 1\), expected \(8,\)"):
        rlk.value_loss(row, None, column)
    with pytest.raises(ValueError, match=r"targets has shape \(8, 1\), expected \(8,\)"):
        rlk.token_stats(torch.zeros(8, 3), column.long())  # token_logprobs takes K targets per row


@pytest.mark.fault(28)
def test_an_option_of_another_function_is_refused_not_ignored():
    for function in (
        lambda **o: logps(**o),
        lambda **o: stats(**o),
        lambda **o: linear(**o),
        lambda **o: policy(**o),
        lambda **o: logits_policy(**o),
        lambda **o: rlk.value_loss(A, A, A, **o),
        lambda **o: dpo(**o),
        lambda **o: rlk.gae(A, A, **o),
    ):
        for option in ("label_smoothing_factor", "z_loss", "epsilon"):
            with pytest.raises(TypeError, match=option):
                function(**{option: 0.1})
    with pytest.raises(TypeError, match="softcap"):
        logps(softcap=30.0)
    with pytest.raises(TypeError, match="'entropy'"):
        logits_policy(entropy=A)
    with pytest.raises(ValueError, match="ratio_level='sequence' needs an objective of a ratio"):
        policy(objective="reinforce", ratio_level="sequence")
    with pytest.raises(ValueError, match="ref_chosen_logps is missing; pass it, or reference_free=True"):
        rlk.dpo_loss(*pairs())
