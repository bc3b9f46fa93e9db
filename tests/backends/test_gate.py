"""The gate to native code: who takes addresses, and F120, F135: every registered op with every tensor in another
layout, length, dtype or place.
"""

import ast
from pathlib import Path

import pytest
import subprocesses
import torch
from op_calls import LAYOUTS, NAMES, apart, at, check_layout, negated, op_calls, places, put, turned
from present_backends import native
from reference import same_bits
from torch.testing._internal.two_tensor import TwoTensor

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import cpu, gate

ROOT = Path(rlk.__file__).resolve().parents[1]


def test_the_gate_alone_takes_addresses():
    found = {}
    for path in sorted((ROOT / "rlkernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            )
            if name in (
                "data_ptr",
                "frombuffer",
                "from_blob",
                "const_data_ptr",
                "mutable_data_ptr",
                "__cuda_array_interface__",
                "to_dlpack",
            ):
                found.setdefault(name, set()).add(path.name)
    assert found == {"data_ptr": {"gate.py"}, "frombuffer": {"cpu_memory.py"}}  # the second one: of our own buffers


@native
def test_native_code_asks_for_addresses_in_one_file():
    csrc = ROOT / "csrc"
    if not csrc.is_dir():
        pytest.skip("the sources are not beside an installed package")
    assert {p.name for p in csrc.rglob("*.*") if "data_ptr" in p.read_text()} == {"tensors.h"}


def freed():
    x = torch.ones(6)
    x.untyped_storage().resize_(0)
    return x


class Innocent(torch.Tensor):
    """A subclass whose memory is its data."""


LIKE = torch.arange(6.0)
TURNED = {
    "every other": lambda: torch.arange(12.0).div(2)[::2],
    "a pending negation": lambda: negated(LIKE.clone()),
    "a subclass with memory of its own": lambda: LIKE.clone().as_subclass(Innocent),
}
REFUSED = {
    "two tensors": (
        lambda: TwoTensor(LIKE.clone(), LIKE.clone()),
        TypeError,
        "w: x is a TwoTensor, a tensor subclass that keeps its data in other tensors",
    ),
    "another dtype": (
        lambda: LIKE.double(),
        TypeError,
        "w: x has dtype torch.float64, expected torch.float32; cast it",
    ),
    "another length": (lambda: LIKE[:5], ValueError, r"w: x has shape \(5,\), expected \(6,\)"),
    "another shape": (lambda: LIKE.view(2, 3), ValueError, r"w: x has shape \(2, 3\), expected \(6,\)"),
    "no data": (lambda: LIKE.to("meta"), RuntimeError, "w: x is on meta, expected cpu; move it"),
    "sparse": (
        lambda: LIKE.to_sparse(),
        TypeError,
        "w: x has layout torch.sparse_coo, expected a dense strided tensor; call to_dense",
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_what_lies_in_another_way_is_copied_as_it_is_meant(name):
    x = TURNED[name]()
    got = gate.taken("w", "x", x, torch.float32, LIKE.shape, LIKE.device)
    assert type(got) is torch.Tensor and got.is_contiguous() and not got.is_neg() and same_bits(got, LIKE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_something_else_is_refused_by_name(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        gate.taken("w", "x", make(), torch.float32, LIKE.shape, LIKE.device)


@native
def test_the_quick_half_of_the_gate_lets_pass_what_the_other_half_leaves_as_it_is_and_nothing_else():
    def ask(*tensors):
        return cpu._cpu.addresses(torch.float32, LIKE, *tensors)

    parameter = torch.nn.Parameter(LIKE.clone())
    assert ask(LIKE, None, parameter) == (LIKE.data_ptr(), 0, parameter.data_ptr()) and ask() == ()
    assert cpu._cpu.addresses(torch.float32, LIKE[:0], LIKE[:0].clone()) == (0,)
    for make in (*TURNED.values(), *(r[0] for r in REFUSED.values()), freed, lambda: "no tensor", lambda: 3):
        assert ask(LIKE, make()) is None and ask(make(), LIKE) is None


@native
def test_a_tensor_whose_storage_was_freed_is_refused():
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(6,\) on cpu has no memory; gather it first"):
        ops.elementwise("k1", freed(), [LIKE], (), None, "cpu")
    x = torch.ones(6, 5)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        ops.token_stats_op(x, torch.zeros(6, dtype=torch.int64), 1.0, -100, None, None, 0, False, "cpu")


@pytest.mark.fault(120)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_every_op_in_another_layout_gives_the_bits_of_its_contiguous_copy(name, layout, backend):
    check_layout(name, layout, backend)


@pytest.mark.parametrize("name", ["token_stats_backward_", "token_stats_backward_into"])
def test_a_gradient_is_not_written_where_two_elements_share_memory(name):
    op, arguments = op_calls("cpu" if cpu.available()[0] else "eager")[name]
    if not cpu.available()[0]:
        pytest.skip("torch refuses it by itself")
    place = (3,) if name.endswith("_") else (len(arguments) - 2,)
    with pytest.raises(RuntimeError, match="overlaps|single memory location"):
        op(*put(arguments, place, torch.ones(1, 37).expand(6, 37)))


@pytest.mark.fault(10, 120)
@pytest.mark.parametrize(
    "name", ["elementwise of a grid", "weighted_loss of columns", "gae", "token_stats", "fused_policy"]
)
def test_a_compiled_program_hands_over_whatever_strides_it_has(name, backend):
    op, arguments = op_calls(backend)[name]
    numbers = [
        a.item() if isinstance(a, torch.Tensor) and a.dtype == torch.float64 and a.dim() == 0 else a for a in arguments
    ]
    numbers = [tuple(a.tolist()) if isinstance(a, torch.Tensor) and a.dtype == torch.float64 else a for a in numbers]
    where = list(places(numbers))

    def program(*tensors):
        given = numbers
        for place, x in zip(where, tensors, strict=True):
            given = put(given, place, x.mT.contiguous().mT if x.dim() > 1 else x)  # a layout that the graph makes
        return op(*given)

    want = op(*numbers)
    torch._dynamo.reset()
    for bent in (turned, apart):
        got = torch.compile(program, backend="aot_eager", fullgraph=True)(
            *(bent(at(numbers, place)) for place in where)
        )
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


HOSTILE = """
    import sys
    import torch
    from op_calls import NAMES, at, op_calls, places, put, results
    from torch.testing._internal.two_tensor import TwoTensor

    backend = sys.argv[1]
    BENT = {
        "short": lambda x: x[:-1] if x.dim() else x[None][:0],
        "long": lambda x: torch.cat([x, x]) if x.dim() else torch.stack([x, x]),
        "empty": lambda x: x.flatten()[:0],
        "one": lambda x: x.flatten()[:1],
        "more dimensions": lambda x: x[None],
        "fewer dimensions": lambda x: x.flatten() if x.dim() > 1 else x.flatten()[0],
        "half": lambda x: x.half() if x.dtype != torch.float16 else x.double(),
        "int8": lambda x: x.to(torch.int8),
        "bool": lambda x: x > 0 if x.dtype != torch.bool else x.double(),
        "complex": lambda x: x.to(torch.complex64),
        "meta": lambda x: x.to("meta"),
        "two": lambda x: TwoTensor(x, x),
        "sparse": lambda x: x.to_sparse() if x.dim() else x.half(),
        "huge": lambda x: torch.full_like(x, 2**40) if x.dtype == torch.int64 else x.half(),
    }
    refused, passed = 0, set()
    for name in NAMES:
        for place in places(op_calls(backend)[name][1]):
            for what, bend in BENT.items():
                for plain in (True, False):
                    op, arguments = op_calls(backend)[name]
                    x = at(arguments, place)
                    try:
                        results(op if plain else op.op, put(arguments, place, bend(x)))
                    except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError, AttributeError):
                        refused += 1
                    else:
                        # Those two go to fakes and to their own tensors; numbers have any dtype.
                        if what not in ("meta", "two") and x.dtype != torch.float64:
                            passed.add(" ".join(map(str, (name, *place, what))))
    print(*sorted(passed), sep=";")
    print("refused", refused)
"""
ALLOWED = {
    # Logits in 16 bits have statistics in fp32, and [1, T, V] is a batch of one.
    *(
        (f"{name} {place} {what}")
        for name, place in (("fused_policy", 1),)
        for what in ("half", "huge", "more dimensions")
    ),
    # One temperature for all rows; one number decides about a gradient.
    *(
        (f"{name} fewer dimensions")
        for name in (
            "token_stats 2",
            "fused_policy 3",
            "linear_stats 4",
            "linear_stats_backward 6",
            *(f"divergence{end} 2" for end in ("", "_backward", "_backward_into")),
            "weighted_loss 7",
            *(f"token_stats_backward{end} 5" for end in ("", "_", "_into")),
        )
    ),
    "token_stats_backward_into 16 more dimensions",
    "divergence_backward_into 12 more dimensions",
    "weighted_loss of columns 6 bool",
    "weighted_loss 7 huge",  # a weight of 1 or 0, any count
}
# Torch's arithmetic, by torch's rules.
WITHOUT_KERNELS = (
    "elementwise_backward ",
    "weighted_loss_backward ",
    "token_stats_backward_into 17 ",
    "divergence of top log-probabilities ",
    "divergence_backward_into 13 ",
)


@pytest.mark.fault(135)
def test_no_op_crashes_on_arguments_that_are_short_of_another_dtype_or_elsewhere(backend):
    done = subprocesses.code(HOSTILE, backend, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    passed, refused = done.stdout.splitlines()
    assert int(refused.split()[1]) > 1000
    if backend == "cpu":
        assert {p for p in passed.split(";") if not p.startswith(WITHOUT_KERNELS)} == ALLOWED
