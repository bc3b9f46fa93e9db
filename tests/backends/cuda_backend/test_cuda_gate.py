"""The gate of the CUDA backend over the CPU build of its sources: F120, F132, F135 and F140, what lies in another way,
or is something else.
"""

import pytest
import torch
from flat_backend import Flat
from op_calls import LAYOUTS, NAMES, at, check_layout, op_calls, places, put, results
from reference import draw_rows
from row_calls import gradient, run, same

from rlkernels import tracing


@pytest.mark.fault(120)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", [n for n in NAMES if not n.startswith(("elementwise_backward", "weighted_loss_backward"))]
)
def test_every_tensor_of_every_op_in_a_layout_gives_the_bits_of_its_contiguous_copy(name, layout, public):
    check_layout(name, layout, "eager")


MASKS = {
    "every other column": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "columns first": lambda m: m.t().contiguous().t(),
    "one column for all": lambda m: m[:, :1].expand(m.shape),
    "one row for all": lambda m: m[:1].expand(m.shape),
    "rows apart": lambda m: torch.cat([m, ~m], -1)[:, : m.shape[-1]],
    "one dimension, every other column": lambda m: m[1].repeat_interleave(2)[::2],
    "one dimension, one column for all": lambda m: m[1, :1].expand(m.shape[1]),
}


@pytest.mark.fault(140)
@pytest.mark.parametrize("layout", MASKS)
def test_a_vocab_mask_of_any_strides_is_read_as_it_is_meant(layout, backend):
    x, targets, mask = draw_rows((5,), 1030)
    mask[:, 0] = True
    bent = MASKS[layout](mask)
    plain = bent.clone(memory_format=torch.contiguous_format)
    stats, expected = run(backend, x, targets, mask=bent), run(backend, x, targets, mask=plain)
    assert same(stats, expected)
    upstream = torch.linspace(-1, 1, 5), torch.linspace(1, 2, 5), None
    assert same(
        [gradient(backend, upstream, x, targets, stats, mask=bent)],
        [gradient(backend, upstream, x, targets, stats, mask=plain)],
    )
    one = torch.ones(5)
    fused, expected = (
        Flat(backend).fused_policy("nll", x, targets, 1.0, -100, m, [], [], one, None, None, None, None, True, None)
        for m in (bent, plain)
    )
    assert same(fused, expected)


BENT = {
    "short": lambda x: x[:-1] if x.dim() else x[None][:0],
    "long": lambda x: torch.cat([x, x]) if x.dim() else torch.stack([x, x]),
    "half": lambda x: x.half(),
    "int8": lambda x: x.to(torch.int8),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.fault(135)
@pytest.mark.parametrize(
    "name",
    ["token_stats", "token_stats_backward", "fused_policy", "elementwise", "weighted_loss of columns", "gae of packed"],
)
def test_a_tensor_that_is_short_of_another_dtype_or_elsewhere_is_refused(name, backend):
    arguments = op_calls("eager")[name][1]
    for place in places(arguments):
        if at(arguments, place).dtype == torch.float64:
            continue  # a number
        for what, bend in BENT.items():
            if (name, place, what) == ("fused_policy", (1,), "half"):
                continue  # logits in 16 bits have statistics in fp32
            given = put(op_calls("eager")[name][1], place, bend(at(arguments, place)))
            op = name.split(" ")[0]
            with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
                called(backend, op, given)


def called(backend, op, given):
    """The backend's own function with the arguments of the op."""
    *given, _ = given
    given = [
        tracing.value(x) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and x.dim() == 0 else x
        for x in given
    ]
    given = [tracing.values(x) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x for x in given]
    if op == "token_stats":
        given = given[:7]
    elif op == "token_stats_backward":
        given = [*given, None]
    elif op == "fused_policy":
        given = [*given[:-1], None]
    elif op == "elementwise":
        objective, first, others, *rest = given
        given = [objective, [first, *others], *rest]
    elif op == "weighted_loss":
        objective, first, _, _, *rest = given
        given = [objective, first, [], *rest]
    return results(getattr(backend, op), given)


@pytest.mark.fault(132)
def test_a_loss_beyond_fp32_is_infinite(backend):
    large, one = torch.full((4,), 3e38), torch.ones(4)
    assert backend.elementwise("nll", [-large], [], None)[0] == torch.inf
    assert backend.weighted_loss("nll", -large, [], [], [], one, None, 1.0)[0] == torch.inf
    x = torch.tensor([[0.0, 3e38]] * 4)
    assert (
        Flat(backend).fused_policy(
            "nll",
            x,
            torch.zeros(4, dtype=torch.int64),
            1.0,
            -100,
            None,
            [],
            [],
            one,
            None,
            None,
            None,
            None,
            False,
            None,
        )[0]
        == torch.inf
    )


@pytest.mark.fault(135)
def test_an_objective_is_called_with_the_columns_that_it_takes(backend):
    one = torch.ones(4)
    for columns, params in (([one], []), ([one, one], []), ([one, one, one], [0.2])):
        with pytest.raises(ValueError, match=r"objective 'ppo_clip' takes 3 columns and 2 parameters, got \d and \d"):
            backend.elementwise("ppo_clip", columns, params, None)
