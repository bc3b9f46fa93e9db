"""The rules of the design, executed: who imports whom, how large a file may be, what may not be written, what an import
costs.
"""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import longest_first
import pytest
import subprocesses
from paths import ROOT, TESTS

import rlkernels
from rlkernels.cli.doctor import ENVIRONMENT

PACKAGE = ROOT / "rlkernels"
MODULES = sorted(PACKAGE.rglob("*.py"))
BUILD = [ROOT / name for name in ("setup.py", "setup_build.py", "setup_cuda.py")]
CODE = [
    path
    for folder in ("rlkernels", "csrc", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
] + BUILD

LAYERS = [
    {"types", "tracing", "installing"},
    {"checks", "packed_rows"},
    {"objectives"},
    {"backends", "sequences"},
    {"aggregation", "packing"},
    {"ops"},
    {"logits_layout"},
    {"logprobs", "advantages", "rollout"},
    {"losses", "trajectories"},
    {"linear", "presets"},
    {"integrations"},
    {"cli", "launch"},
]
"""Lowest first. A module imports from layers below its own, and a package from itself."""
WITHOUT_OPS = {
    "types",
    "tracing",
    "installing",
    "packed_rows",
    "checks",
    "objectives",
    "sequences",
    "aggregation",
    "packing",
}
COMPILED = {"_cpu": "backends/cpu_module.py", "_cuda": "backends/cuda.py"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree):
    """``(module, node)`` of every import; ``from rlkernels import x`` counts as ``rlkernels.x``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (
                (f"{node.module}.{alias.name}" if node.module == "rlkernels" else node.module, node)
                for alias in node.names
            )


def own(tree):
    """The modules of ours that a file imports, by their first name below ``rlkernels``."""
    return {module.split(".")[1] for module, _ in imports(tree) if module.startswith("rlkernels.")}


def layer(name):
    found = [rank for rank, names in enumerate(LAYERS) if name in names]
    assert found, f"module {name!r} has no layer; place it in LAYERS"
    return found[0]


def parse(path):
    return ast.parse(path.read_text(), filename=str(path))


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parent != PACKAGE or p.stem not in ("__init__", "__main__")], ids=name_of
)
def test_a_module_imports_only_from_the_layers_below_it(path):
    me = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in own(parse(path)) - set(COMPILED):
        below = other == me or layer(other) < layer(me)
        assert below, f"{name_of(path)} is in layer {layer(me)} and imports {other} of layer {layer(other)}"
        if me in WITHOUT_OPS:
            assert other in WITHOUT_OPS, f"{name_of(path)} must stay free of ops and backends, but imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_imports_nothing_that_lies_beside_it(path):
    found = {module.split(".")[0] for module, _ in imports(parse(path))} & {"benchmarks", "examples", "tests"}
    assert not found, f"{name_of(path)} imports {found}, which no wheel holds"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_compiled_modules_and_triton_are_imported_by_their_backend_alone(path):
    me = path.relative_to(PACKAGE).as_posix()
    for module, _ in imports(parse(path)):
        for compiled, owner in COMPILED.items():
            assert module.split(".")[:2] != ["rlkernels", compiled] or me == owner, (
                f"{me} imports {compiled}, which belongs to {owner}"
            )
        assert module.split(".")[0] != "triton" or me.startswith("backends/triton/"), f"{me} imports triton"


def test_only_ops_register_with_torch():
    """Attribute chains and imported names: ``torch.library``, ``autograd.Function``, ``register_autograd``."""
    for path in MODULES:
        if path.parent.name == "ops" and path.name in ("register.py", "loss_with_gradients.py"):
            continue
        for node in ast.walk(parse(path)):
            written = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Import, ast.ImportFrom)) else ""
            found = re.search(r"torch\.library|autograd\.Function|register_autograd|import.*\bcustom_op\b", written)
            assert not found, (
                f"{name_of(path)}:{node.lineno}: {written}; only ops/register.py and ops/loss_with_gradients.py may"
            )


def test_integrations_import_other_libraries_inside_functions():
    allowed = set(sys.stdlib_module_names) | {"torch", "rlkernels"}
    for path in sorted((PACKAGE / "integrations").rglob("*.py")):
        tree = parse(path)
        inside = {
            id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
        }
        for module, node in imports(tree):
            assert module.split(".")[0] in allowed or id(node) in inside, (
                f"{name_of(path)}:{node.lineno} imports {module} at import time"
            )


@pytest.mark.fault(141)
def test_no_named_tuple_has_what_the_oldest_torch_cannot_trace():
    """Dynamo of torch 2.8 follows neither a property of a named tuple nor its ``_replace``; that of 2.13 makes one by
    ``_make``, which asks its length.
    """
    for path in MODULES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases):
                properties = [
                    f.name
                    for f in node.body
                    if isinstance(f, ast.FunctionDef) and "property" in map(ast.unparse, f.decorator_list)
                ]
                assert not properties, f"{name_of(path)}: {node.name} has properties {properties}; make them methods"
                assert "__len__" not in {f.name for f in node.body if isinstance(f, ast.FunctionDef)}, (
                    f"{name_of(path)}: {node.name} has a length of its own"
                )
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("._replace"):
                raise AssertionError(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}; call tracing.replaced")


@pytest.mark.fault(50, 52, 102, 103)
def test_no_triton_kernel_is_tuned_at_run_time_or_adds_in_the_order_of_arrival_or_needs_scratch_memory():
    """A tuner runs a kernel several times, which corrupts one that writes in place; ``dot`` may round fp32 to TF32; and
    descriptors take scratch memory from an allocator that every thread would have to set.
    """
    banned = re.compile(r"autotune|Autotuner|heuristics|atomic_\w+|dot|dot_scaled|make_tensor_descriptor|set_allocator")
    paths = sorted((PACKAGE / "backends/triton").glob("*.py"))
    assert len(paths) > 5
    for path in paths:
        for node in ast.walk(parse(path)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert not banned.fullmatch(name), f"{name_of(path)}:{node.lineno} uses {name}"


def test_oracles_import_torch_alone():
    assert {module.split(".")[0] for module, _ in imports(parse(ROOT / "tests/support/oracles.py"))} == {"torch"}


def test_native_code_includes_neither_torch_nor_python_outside_its_bindings():
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            headers = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
            foreign = [h for h in headers if re.match(r"torch/|ATen/|c10/|Python\.h|pybind11/", h)]
            if path.name in ("bindings.cpp", "tensors.h"):  # the second one is included by the first ones alone
                foreign = [h for h in foreign if not h.startswith(("pybind11/", "Python.h"))]
            assert not foreign, f"{name_of(path)} includes {foreign}"
            assert path.name not in {"math.h", "float.h", "string.h", "time.h"}, (
                f"{name_of(path)} shadows a system header"
            )


# Printed, or a tool that is one file so that it can be taken elsewhere.
@pytest.mark.parametrize(
    "path", [p for p in CODE if p.name != "objectives.h" and p.parent.name != "tools"], ids=name_of
)
def test_a_file_has_at_most_600_lines(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 600, f"{name_of(path)} has {lines} lines; split it by idea"


def test_public_names_are_the_documented_ones():
    documented = re.findall(r"^\| `(\w+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(rlkernels.__all__)
    assert all(getattr(rlkernels, name).__doc__ for name in rlkernels.__all__), "a public name has no docstring"


@pytest.mark.fault(63)
def test_the_distribution_has_one_name_and_the_version_of_the_package():
    project = (ROOT / "pyproject.toml").read_text().split("[project]")[1].split("\n[")[0]
    assert re.findall(r'^name = "(.+)"$', project, re.MULTILINE) == ["rlkernels"]
    assert 'dynamic = ["version"]' in project  # tests/repository/test_version.py asks the build for it
    # The form that PEP 440 calls canonical, so that no tool writes it another way.
    assert re.fullmatch(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?", rlkernels.__version__)


def test_no_code_reads_pickles_or_evaluates_text():
    banned_modules = {"pickle", "marshal", "shelve", "dill"}
    round_trip = {"test_backend_selection.py"}  # F61 pickles what it has just made
    for path in (p for p in CODE if p.suffix == ".py" and p.name not in round_trip):
        tree = parse(path)
        for module, node in imports(tree):
            assert module.split(".")[0] not in banned_modules, f"{name_of(path)}:{node.lineno} imports {module}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                banned = called in {"eval", "torch.load", "os.system", "os.popen"}
                assert not banned, f"{name_of(path)}:{node.lineno} calls {called}"
                shell = [k for k in node.keywords if k.arg == "shell" and getattr(k.value, "value", True)]
                assert not shell, f"{name_of(path)}:{node.lineno} runs a shell"


def test_no_file_names_a_folder_of_one_machine():
    homes = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|opt)/[\w.-]+")
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run")
    texts = [ROOT / name for name in names]
    for path in [*CODE, *texts, *sorted((ROOT / "docs").rglob("*.md"))]:
        found = homes.findall(path.read_text())
        assert not found or path == Path(__file__).resolve(), f"{name_of(path)} names {found}"


def test_every_environment_variable_is_in_the_table_of_doctor():
    read = set()
    for path in [*MODULES, *BUILD]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.getenv", "os.environ.get"}:
                read.update(a.value for a in node.args[:1] if isinstance(a, ast.Constant))
    for path in (p for p in CODE if p.suffix in {".h", ".cpp", ".cu", ".cuh"} and "csrc" in p.parts):
        read.update(re.findall(r'getenv\("(\w+)"\)', path.read_text()))
    assert read == set(ENVIRONMENT)


def python(code, **variables):
    """What code prints in a fresh interpreter that sees the package under test."""
    done = subprocesses.code(code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_files_that_workers_start_with_come_first_and_are_there():
    at = [SimpleNamespace(path=TESTS / name) for name in ("ops/test_ops.py", longest_first.LONGEST[1], "conftest.py")]
    in_order = [at[1], at[0], at[2]]
    longest_first.order(at, TESTS)
    assert at == in_order and all((TESTS / name).exists() for name in longest_first.LONGEST)


def test_import_adds_less_than_100_ms_or_a_tenth_to_the_import_of_torch(tmp_path):
    # Processor time, best of up to six: the cost of the import, not of what else the machine is doing. The second core
    # of a pair shares its units with the first, so a busy neighbour doubles processor time, too (56 ms alone, 110 ms in
    # a full run). The import of torch, measured in the same process, doubles with it: the ratio of the two was 0.062
    # alone and at most 0.074 beside three busy processes. The first run compiles, since an installed package is
    # compiled, too. The best cannot rise, so the first below the bound ends the search.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": tmp_path}
    # Collected before: a pass over all of torch's objects is due sooner or later, and takes 87 ms where it falls into
    # our import (Python 3.13, torch 2.14).
    code = """
        import gc
        import time
        start = time.process_time()
        import torch
        of_torch = time.process_time() - start
        gc.collect()
        start = time.process_time()
        import rlkernels
        seconds = time.process_time() - start
        print(min(seconds / 0.1, seconds / of_torch / 0.1))
    """
    shares = []
    while len(shares) < 6 and not (shares and min(shares) < 1):
        shares.append(float(python(code, **compiled)))
    assert min(shares) < 1, f"import rlkernels takes {min(shares):.2f} times what it may on top of import torch"


def test_import_loads_no_optional_package():
    optional = "triton transformers trl datasets tokenizers rich matplotlib"
    loaded = python(
        "import sys, torch; before = set(sys.modules); import rlkernels; print(*(set(sys.modules) - before))"
    ).split()
    assert not {name.split(".")[0] for name in loaded} & set(optional.split())


@pytest.mark.fault(58)
def test_import_works_without_optional_packages_and_without_the_compiled_module():
    printed = python(
        """
        import importlib.util
        import sys

        for name in ("triton", "transformers", "trl", "datasets", "tokenizers", "rich", "matplotlib"):
            sys.modules[name] = None
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name == "rlkernels._cpu" else found(name, package)
        import torch
        import rlkernels

        state = rlkernels.available_backends()
        print(state["absent"]["cpu"])
        print(state["serves"]["cpu"]["token_stats"])
        logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
        logp = rlkernels.token_logprobs(logits, torch.tensor([2]))
        logp.sum().backward()
        print(round(logp.item(), 6), round(logits.grad.sum().item(), 6))
    """,
        PATH="",
    )
    reason, backend, numbers = printed.splitlines()
    assert "compiler" in reason
    assert backend == "eager"
    assert numbers.split()[0] == "-0.407606" and float(numbers.split()[1]) == 0.0
