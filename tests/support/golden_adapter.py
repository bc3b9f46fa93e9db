"""Golden cases: loading (special floats, generated inputs), and the comparison of outputs and gradients under the
case's tolerance.
"""

import json
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from paths import TESTS

FOLDER = TESTS / "guarantees/golden"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
INTEGERS = {
    "labels",
    "group_id",
    "rollout_id",
    "trajectory_id",
    "cu_seqlens",
    "seq_lens",
    "input_ids",
    "attention_mask",
    "is_last_step",
    "mask",
}
LISTS = {"process_advantage": {"step_end", "step_reward"}, "gigpo_advantage": {"anchor"}}
"""Inputs of an operation that stay lists: of several lengths, or of names."""
NORMALIZERS = {
    "horizon": "horizon",
    "batch_num_tokens": "batch_num_tokens",
    "dp_size": "dp_size",
    "num_items": "batch_num_tokens",
    "num_processes": "dp_size",
    "num_rows": "num_sequences",
}
# Keys of ``expected`` that are no outputs.
INFORMATION = {"grads", "metrics", "source_value", "equals_compact", "raises_or_nan", "raises"}
# What a float32 kernel owes to the number of another system: relative, values and gradients (a gradient sums many
# rounded terms).
FLOAT32_RTOL, FLOAT32_GRAD_RTOL, FLOAT32_ATOL = 1e-5, 1e-4, 2e-6


class NotOffered(Exception):
    """The public functions cannot express this case."""


def expect(condition, what):
    if not condition:
        raise NotOffered(what)


def aggregation(parameters, name="aggregation"):
    """Mode and normalisers in our names."""
    mode = parameters.pop(name).replace("_", "-")
    normalizers = {NORMALIZERS[key]: value for key, value in (parameters.pop("normalizer", None) or {}).items()}
    if parameters.pop("count_empty_rows", False):
        normalizers["count_empty_rows"] = True
    return mode, normalizers


class Live(NamedTuple):
    """An output that other systems leave undefined at dead positions and we define as 0."""

    value: torch.Tensor
    live: torch.Tensor


def generated(spec):
    """``scale * sin(step * k + offset)`` over the flat index ``k``, or zeros."""
    if spec["gen"] == "zeros":
        return torch.zeros(spec["shape"], dtype=torch.float64)
    if spec["gen"] != "sin":
        raise ValueError(f"unknown generator {spec['gen']!r}")
    count = 1
    for size in spec["shape"]:
        count *= size
    k = torch.arange(count, dtype=torch.float64)
    return (spec["scale"] * torch.sin(spec["step"] * k + spec["offset"])).reshape(spec["shape"])


def special(x):
    if isinstance(x, list):
        return [special(item) for item in x]
    return float(x) if isinstance(x, str) else x


def tensor(value, dtype=torch.float64):
    """Nested lists with the strings "nan", "inf", "-inf" for special floats, or a generator."""
    if isinstance(value, dict):
        return generated(value).to(dtype)
    return torch.tensor(special(value), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    file: str
    id: str
    op: str
    dtype: torch.dtype
    inputs: dict
    parameters: dict
    expected: dict
    tolerance: dict

    def tensors(self, dtype):
        """The inputs; those that a gradient is listed for require one. What is no array of numbers stays as it is."""
        wanted = {name for grad in self.expected.get("grads", ()) for name in grad["wrt"]}
        result = {}
        for name, value in self.inputs.items():
            if not isinstance(value, (list, dict)) or name in LISTS.get(self.op, ()):
                result[name] = value
            elif name == "vocab_mask":
                result[name] = torch.tensor(value)
            else:
                whole = name in INTEGERS and not (name == "labels" and self.parameters.get("soft"))
                result[name] = tensor(value, torch.int64 if whole else dtype).requires_grad_(name in wanted)
        return result

    def raised(self):
        """The error that the case expects in place of numbers, with a part of its message; None for numbers."""
        if self.expected.get("raises_or_nan"):
            return IndexError, "outside"
        return (ValueError, "differs at its first token") if "raises" in self.expected else None

    def compact(self):
        """The same case without its dead tokens, where the file gives one."""
        smaller = {name: value for name, value in self.expected["equals_compact"].items() if name in self.inputs}
        return replace(self, inputs=smaller, expected={})


def load():
    cases = []
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text())
        assert content["format"] == "rlkernels-golden-1" and content["count"] == len(content["cases"]), path
        cases += [
            Case(
                path.name,
                case["id"],
                case["op"],
                DTYPES[case["dtype"]],
                case["inputs"],
                case["parameters"],
                case["expected"],
                case["tolerance"],
            )
            for case in content["cases"]
        ]
    return cases


def close(got, want, rtol, atol, what):
    if isinstance(got, Live):
        live = got.live != 0
        dead = got.value[~live]
        assert torch.equal(dead, torch.zeros_like(dead)), f"{what} is not 0 at dead positions"
        got, want = got.value[live], tensor(want)[live]
    want = want if isinstance(want, torch.Tensor) else tensor(want)
    got = got.detach().double()
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}")


def expected_values(case):
    """Name in ``expected`` and value of every output and metric that the case lists."""
    values = {name: want for name, want in case.expected.items() if name not in INFORMATION}
    return values | {f"metrics.{name}": want for name, want in case.expected.get("metrics", {}).items()}


def missing_outputs(case, outputs):
    return [name for name in expected_values(case) if name.removeprefix("metrics.") not in outputs]


def check_outputs(case, outputs, dtype):
    """Compares every expected output that ``outputs`` holds."""
    rtol, atol = _tolerance(case, dtype, "")
    missing = missing_outputs(case, outputs)
    for name, want in expected_values(case).items():
        if name not in missing:
            close(outputs[name.removeprefix("metrics.")], want, rtol, atol, name)


def check_gradients(case, inputs, outputs, dtype):
    rtol, atol = _tolerance(case, dtype, "grad_")
    for grad in case.expected.get("grads", ()):
        total = 0
        for name in grad["of"].split("+"):
            upstream = grad["upstream"]
            upstream = upstream[name] if isinstance(upstream, dict) else upstream
            factor = 1.0 if upstream == "ones" else tensor(upstream, outputs[name].dtype)
            total = total + (outputs[name] * factor).sum()
        found = torch.autograd.grad(total, [inputs[name] for name in grad["wrt"]], retain_graph=True)
        for (name, want), got in zip(grad["wrt"].items(), found, strict=True):
            what = f"d {grad['of']} / d {name}"
            assert got.dtype == inputs[name].dtype, what
            if isinstance(want, dict):
                close((got.double() ** 2).sum(), want["sumsq"], rtol, atol, f"{what}, sum of squares")
                for place, value in want["at"].items():
                    close(got[tuple(map(int, place.split(",")))], value, rtol, atol, f"{what} at {place}")
            else:
                close(got, want, rtol, atol, what)


def _tolerance(case, dtype, kind):
    rtol, atol = (case.tolerance.get(kind + name, case.tolerance[name]) for name in ("rtol", "atol"))
    if dtype == torch.float64:
        return rtol, atol
    return max(rtol, FLOAT32_GRAD_RTOL if kind else FLOAT32_RTOL), max(atol, FLOAT32_ATOL)
