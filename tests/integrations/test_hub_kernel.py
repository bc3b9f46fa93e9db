"""The kernel for the package ``kernels``: names and signatures, its folder, and what that package makes of it."""

import ast
import doctest
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rlkernels.integrations import hub

NAME = "selective_log_softmax_and_entropy"
UNIVERSAL = hub.FOLDER / "torch-universal"


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def plain():
    """The kernel, imported from its folder as ``kernels`` does it, without that package."""
    spec = importlib.util.spec_from_file_location("a_kernel_of_the_hub", UNIVERSAL / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(dtype=torch.float64):
    """Views without their outer positions, as TRL passes them, and a mask; a masked index lies outside of the rows."""
    draw = torch.Generator().manual_seed(0)
    base = (3 * torch.randn(2, 5, 31, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
    index = torch.randint(31, (2, 5), generator=draw)[:, 1:4]
    index[0, 0], index[1, 1] = 30, 1000
    return base, index, torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 1, 1]])[:, 1:4]


def truth(base, index, mask, temperature):
    logp = (base[:, 1:4].double() / temperature).log_softmax(-1)
    taken = logp.gather(-1, index.masked_fill(mask == 0, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(mask != 0, taken, 0.0), torch.where(mask != 0, entropy, 0.0)


def check(call):
    """Holds a function or module to the formula: values, and the gradients of both outputs and of each alone."""
    for dtype, rtol in ((torch.float64, 1e-12), (torch.bfloat16, 1e-5)):
        for weights in ((2.0, 0.5), (1.0, 0.0), (0.0, 1.0)):
            base, index, mask = problem(dtype)
            wide = base.detach().double().requires_grad_()
            got, want = call(base[:, 1:4], index, 0.7, mask), truth(wide, index, mask, 0.7)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=rtol, atol=rtol)
            got[0][0, 1] = 0.0  # TRL masks the result in place
            want[0][0, 1] = 0.0
            for outputs in (got, want):
                sum(w * x.sum() for w, x in zip(weights, outputs, strict=True)).backward()
            rtol_of_gradient = rtol if dtype == torch.float64 else 4e-3
            torch.testing.assert_close(base.grad.double(), wide.grad, rtol=rtol_of_gradient, atol=rtol_of_gradient)


def test_the_folder_holds_the_function_and_its_layer_without_the_package_kernels():
    kernel = plain()
    assert kernel.__all__ == ["layers", NAME]
    assert getattr(kernel, NAME) is hub.selective_log_softmax_and_entropy
    check(getattr(kernel, NAME))
    check(getattr(kernel.layers, NAME)())
    function = inspect.signature(getattr(kernel, NAME)).parameters
    assert list(function) == ["logits", "index", "temperature", "row_mask"]
    assert function["temperature"].default == 1.0 and function["row_mask"].default is None
    layer = getattr(kernel.layers, NAME)
    assert list(inspect.signature(layer.forward).parameters) == ["self", *function]
    assert layer.__init__ is nn.Module.__init__ and layer.can_torch_compile and layer.has_backward
    assert set(dir(layer)) - set(dir(nn.Module)) <= {"can_torch_compile", "has_backward"}


def test_one_percent_of_error_is_noticed():
    with pytest.raises(AssertionError):
        check(lambda *arguments: [1.01 * x for x in hub.selective_log_softmax_and_entropy(*arguments)])


def test_the_signature_is_that_of_trl():
    """From its source, because its module imports Triton."""
    trl = importlib.util.find_spec("trl")
    if trl is None:
        pytest.skip("TRL is not installed")
    source = Path(trl.origin).parent / "kernels/logprob_entropy.py"
    if not source.exists():
        pytest.skip("this TRL has no kernel of its own")
    functions = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    theirs = functions[NAME].args
    ours = inspect.signature(hub.selective_log_softmax_and_entropy).parameters
    assert [a.arg for a in theirs.args] == list(ours)
    assert [ast.literal_eval(d) for d in theirs.defaults] == [p.default for p in list(ours.values())[2:]]


def test_metadata_and_build_name_the_same_kernel():
    metadata = json.loads((UNIVERSAL / "metadata.json").read_text())
    build = (hub.FOLDER / "build.toml").read_text()
    assert f'name = "{metadata["name"]}"' in build and f"version = {metadata['version']}" in build
    assert all(f'"{device}"' in build for device in hub.DEVICES)
    source = hub.FOLDER / "torch-ext" / metadata["name"].replace("-", "_") / "__init__.py"
    assert source.read_text() == (UNIVERSAL / "__init__.py").read_text()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"row_mask": torch.ones(2, 2)}, ValueError, rf"{NAME}: row_mask has shape \(2, 2\), expected \(2, 3\)"),
        ({"index": torch.zeros(2, 3)}, TypeError, "int32 or int64"),
        ({"index": torch.full((2, 3), -100)}, IndexError, "-100"),
        ({"index": [0]}, TypeError, "must be a torch.Tensor, got list"),
    ],
)
def test_a_bad_argument_is_named(change, error, message):
    arguments = {"logits": torch.zeros(2, 3, 4), "index": torch.zeros(2, 3, dtype=torch.long), "row_mask": None}
    arguments["row_mask"] = torch.ones(2, 3)
    with pytest.raises(error, match=message):
        hub.selective_log_softmax_and_entropy(**arguments | change)


def test_the_layer_compiles_without_a_break():
    layer = getattr(plain().layers, NAME)()

    def loss(logits, index, mask):
        logp, entropy = layer(logits, index, 0.7, mask)
        return (logp + 0.1 * entropy).sum()

    base, index, mask = problem(torch.float32)
    index = index.masked_fill(mask == 0, 0)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(base[:, 1:4], index, mask)
    torch.testing.assert_close(compiled, loss(base[:, 1:4], index, mask))


def test_the_mapping_refuses_devices_that_nothing_serves_and_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match="devices must be among cpu, cuda, rocm, xpu, got tpu"):
        hub.kernel_mapping(("cpu", "tpu"))
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match='pip install "kernels>=0.17"'):
        hub.kernel_mapping()


def test_the_examples_of_the_docstrings_run():
    found = doctest.testmod(hub, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


@pytest.fixture
def kernels():
    """The real package."""
    return pytest.importorskip("kernels", reason="the package kernels is not installed")


def test_kernels_reads_the_build_and_loads_the_folder(kernels):
    kernel = kernels.get_local_kernel(hub.FOLDER)
    assert getattr(kernel, NAME) is hub.selective_log_softmax_and_entropy
    check(getattr(kernel, NAME))
    assert any(loaded.module is kernel for loaded in kernels.get_loaded_kernels())
    build = kernels._rust.Build.open(hub.FOLDER).general
    assert {str(backend).lower() for backend in build.backends} == set(hub.DEVICES)


def test_the_name_of_the_hub_is_served_from_the_folder(kernels, monkeypatch):
    """The call that TRL's own page shows for its kernel."""
    kernels.load._parse_local_kernel_overrides.cache_clear()
    monkeypatch.setenv("LOCAL_KERNELS", f"trl-lib/trl-losses={hub.FOLDER}")
    kernel = kernels.get_kernel("trl-lib/trl-losses", version=0, trust_remote_code=["trl-lib/trl-losses"])
    kernels.load._parse_local_kernel_overrides.cache_clear()
    assert getattr(kernel, NAME) is hub.selective_log_softmax_and_entropy


@pytest.mark.parametrize("compiled", [False, True])
def test_kernelize_puts_ours_into_a_model_of_the_caller(kernels, compiled):
    @kernels.use_kernel_forward_from_hub(NAME)
    def score(logits, index, temperature=1.0, row_mask=None):
        return "the caller's own"

    @kernels.use_kernelized_func(score)
    class Head(nn.Module):
        def forward(self, *arguments):
            return score(*arguments)

    head = Head()
    arguments = problem()[0].detach(), torch.zeros(2, 5, dtype=torch.long)
    assert head(*arguments) == "the caller's own"
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE if compiled else kernels.Mode.TRAINING
    with kernels.use_kernel_mapping(hub.kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(head, mode=mode, device="cpu", use_fallback=False)
    check(head)


@pytest.mark.parametrize("repository", ["LocalFuncRepository", "LocalLayerRepository"])
def test_repositories_load_the_function_as_a_module_that_trains_and_compiles(kernels, repository):
    keyword = {"LocalFuncRepository": "func_name", "LocalLayerRepository": "layer_name"}[repository]
    kind = getattr(kernels, repository, None)
    if kind is None:
        pytest.skip(f"this version of kernels has no {repository}")
    layer = kind(hub.FOLDER, **{keyword: NAME}).load()
    assert issubclass(layer, nn.Module) and layer.can_torch_compile and layer.has_backward
    check(layer())
