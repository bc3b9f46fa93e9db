"""Which GPU backend goes first: what was measured, then what a model expects, then ``DEVICES``; no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

import rlkernels
from rlkernels import ops
from rlkernels.backends import DEVICES, cuda, expected_order, measured_order, serving

COMPILED = {"ppo_clip": (3, 2), "pairwise": (1, 0), "nll": (1, 0)}


@pytest.fixture
def gpu(monkeypatch):
    """A machine with both backends and a GPU of the capability in ``gpu.capability``."""
    here = SimpleNamespace(capability=(9, 0), asked=0)

    def capability(index):
        here.asked += 1
        return here.capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(OBJECTIVES=COMPILED))
    monkeypatch.setattr(expected_order, "_capable", {})
    monkeypatch.setattr(rlkernels.backends, "_present", {"triton", "cuda"})
    return here


def chosen(op, dtype=torch.bfloat16, **rest):
    return serving(op, "cuda", dtype, 151936, index=0, **rest)


@pytest.mark.parametrize("capability", ((9, 0), (10, 0), (12, 0)))
def test_on_hopper_and_newer_fused_policy_and_two_models_go_to_cuda_and_the_rest_to_triton(gpu, capability):
    gpu.capability = capability
    assert chosen("fused_policy") == chosen("fused_policy", objective="ppo_clip") == "cuda"
    assert chosen("token_stats", models=2) == "cuda"
    for op in ("token_stats", "token_stats_backward", "divergence", "elementwise", "weighted_loss", "gae"):
        assert chosen(op) == "triton"
    assert gpu.asked == 1, "the device is asked once, because a call is microseconds"


@pytest.mark.parametrize("capability", ((8, 0), (8, 9)))
def test_an_older_gpu_keeps_triton_first(gpu, capability):
    gpu.capability = capability
    assert chosen("fused_policy") == chosen("token_stats", models=2) == "triton"


def test_without_the_module_triton_serves_and_no_device_is_asked(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    assert chosen("fused_policy") == "triton" and gpu.asked == 0


def test_a_chip_of_amd_is_no_hopper_whatever_its_number(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    gpu.capability = (9, 4)
    assert chosen("fused_policy") == "triton"


def test_what_cuda_has_no_kernel_for_stays_with_triton(gpu):
    assert chosen("fused_policy", torch.float64) == chosen("token_stats", torch.float64, models=2) == "triton"
    assert chosen("fused_policy", objective="of_a_user") == "triton"
    assert chosen("fused_policy", objective="pairwise") == "triton"  # compiled, and not into the kernels over rows


def test_what_was_measured_comes_before_what_is_expected(gpu, monkeypatch):
    monkeypatch.setattr(measured_order, "TABLE", {("fused_policy", "cuda", 2, "large"): ("triton", "cuda")})
    assert chosen("fused_policy") == "triton" and chosen("fused_policy", torch.float32) == "cuda"


def test_the_others_follow_in_their_order(gpu):
    assert expected_order.expected("fused_policy", torch.bfloat16, DEVICES["cuda"], 0) == ("cuda", "triton", "eager")
    assert expected_order.expected("fused_policy", torch.bfloat16, ("triton", "eager"), 0) == ("triton", "eager")


def test_a_graph_is_compiled_with_the_choice_in_it(gpu):
    """Dynamo does not trace the question for the capability, which it would put into the graph: it asks once."""
    stand_in = SimpleNamespace(
        is_cpu=False, device=SimpleNamespace(type="cuda", index=0), dtype=torch.bfloat16, shape=(8, 151936), dim=int
    )

    def call(x):
        name = serving("fused_policy", "cuda", torch.bfloat16, 151936, index=0)
        return x + (1 if name == "cuda" else 2)

    assert torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1
    assert gpu.asked == 1
    stand_in.dim = lambda: 2
    assert ops.serving("fused_policy", stand_in) == "cuda"


@pytest.fixture
def asked(monkeypatch):
    """What the public functions tell of their work when they ask who serves it."""
    found, real = [], ops.serving

    def recorded(op, tensor, **told):
        found.append({"op": op, "models": 1, "objective": None, **told})
        return real(op, tensor, **told)

    monkeypatch.setattr(ops, "serving", recorded)
    return found


X, Y, W, COLUMN = torch.randn(2, 5), torch.tensor([0, 4]), torch.randn(7, 5), torch.ones(2)


def policy(kl=None):
    reference = {} if kl is None else {"ref_logits": X, "kl": kl, "kl_coef": 0.1}
    return rlkernels.logits_policy_loss(X, Y, COLUMN - 1, COLUMN, **reference)


@pytest.mark.parametrize(
    ("call", "models"),
    (
        (lambda: rlkernels.token_stats(X, Y), 1),
        (lambda: rlkernels.token_stats(X, Y, ref_logits=X, kl="exact"), 2),
        (lambda: policy("reverse_kl"), 2),
        (lambda: policy("k3"), 2),
        (lambda: policy("forward_kl"), 1),  # the divergence reads both, by itself
    ),
)
def test_a_call_tells_how_many_models_it_reads(asked, call, models):
    call()
    assert asked[0]["op"] == "token_stats" and asked[0]["models"] == models


@pytest.mark.parametrize(
    ("call", "name"),
    (
        (policy, "ppo_clip"),
        (lambda: rlkernels.linear_policy_loss(X, W, Y, COLUMN - 1, COLUMN), "ppo_clip"),
        (lambda: rlkernels.sft_loss(X, Y), "nll"),
        (lambda: rlkernels.linear_sft_loss(X, W, Y), "nll"),
    ),
)
def test_a_loss_tells_its_objective(asked, call, name):
    call()
    assert ("fused_policy", name) in [(told["op"], told["objective"]) for told in asked]
