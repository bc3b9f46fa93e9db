"""The objects that stand in TRL's seams, called with TRL's own conventions, against float64 formulas."""

import types

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")  # test_trl_parity.py takes older ones, too

from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

from rlkernels.integrations import trl as integration  # noqa: E402

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    integration.unpatch()


@pytest.fixture
def head():
    integration.patch(level="fused")
    return utils._ChunkedLogProbFunction


def inputs(n=23, h=16, v=301, dtype=torch.float32):
    torch.manual_seed(3)
    hidden, weight, bias = torch.randn(n, h).to(dtype), torch.randn(v, h).to(dtype), torch.randn(v).to(dtype)
    return tuple(x.requires_grad_() for x in (hidden, weight, bias)), torch.randint(0, v, (n,))


def reference(hidden, weight, bias, targets, temperature, softcap, scale):
    """Float64, dense, from the definition ``softcap(scale (h W + b)) / T``."""
    u = (hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())) * scale
    z = (u if softcap is None else softcap * torch.tanh(u / softcap)) / temperature
    log_p = z.log_softmax(-1)
    entropy, squares = -(log_p.exp() * log_p).sum(1), torch.logsumexp(2 * log_p, 1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy, squares, z.mean(1), z.argmax(1) == targets


# Plain; a cold temperature; Gemma's cap, Cohere's scale and GPT-J's bias together.
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "biased"),
    [(1.0, None, 1.0, False), (0.6, None, 1.0, True), (1.3, 5.0, 0.25, True)],
)
def test_the_head_returns_all_five_outputs_and_three_gradients(head, temperature, softcap, scale, biased):
    (hidden, weight, bias), targets = inputs()
    bias = bias if biased else None
    found = head.apply(hidden, weight, bias, targets, temperature, 32768, softcap, scale, ("log_probs", *OUTPUTS))
    twins = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = reference(*twins, targets, temperature, softcap, scale)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.to(truth.dtype), truth, rtol=1e-5, atol=2e-5)
    assert [x.requires_grad for x in found] == [True, True, False, False, False]
    torch.manual_seed(5)
    upstream = torch.randn(2, len(targets))
    (found[0] * upstream[0] + found[1] * upstream[1]).sum().backward()
    (expected[0] * upstream[0] + expected[1] * upstream[1]).sum().backward()
    for ours, truth in zip((hidden, weight, bias), twins, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-4, atol=2e-5)


def test_the_head_returns_none_for_what_was_not_asked_and_skips_a_frozen_weight(head):
    (hidden, weight, _), targets = inputs()
    weight.requires_grad_(False)
    logprobs, *rest = head.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))
    assert rest == [None] * 4
    logprobs.sum().backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_bf16_hidden_states_on_an_fp32_head_are_better_than_trls_rounded_logits(head):
    (hidden, weight, _), targets = inputs(dtype=torch.bfloat16)
    expected = reference(hidden.detach(), weight.detach(), None, targets, 1.0, None, 1.0)[0]
    ours = head.apply(hidden, weight.float(), None, targets, 1.0, 32768)[0]
    theirs = ChunkedLogProbFunction.apply(hidden, weight.float(), None, targets, 1.0, 32768)[0]
    assert ours.dtype == torch.float32 and (ours - expected).abs().max() < 2e-5
    assert (theirs - expected).abs().max() > 20 * (ours - expected).abs().max()


def test_under_autocast_the_head_runs_in_the_autocast_dtype_and_keeps_fp32_logits(head):
    (hidden, weight, _), targets = inputs()
    rounded = hidden.detach().bfloat16(), weight.detach().bfloat16()
    expected = reference(*rounded, None, targets, 1.0, None, 1.0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = head.apply(hidden, weight, None, targets, 1.0, 32768)[0]
    assert ours.dtype == torch.float32 and (ours - expected).abs().max() < 2e-5
    ours.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_an_empty_head_raises_and_says_to_gather(head):
    (hidden, _, _), targets = inputs()
    with pytest.raises(ValueError, match=r"weight must have shape \[V, 16\], got \(0,\): gather the sharded head"):
        head.apply(hidden, torch.empty(0), None, targets, 1.0, 32768)


def test_outside_the_domain_strict_raises_and_loose_delegates_bit_for_bit_and_counts():
    original = utils._ChunkedLogProbFunction
    (hidden, weight, _), targets = inputs()
    weight.ds_id = 0  # what ZeRO-3 marks its parameters with
    integration.patch(level="fused")
    with pytest.raises(RuntimeError, match=r"fused_head: the head is sharded by ZeRO-3.*patch\(strict=False\)"):
        utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)
    integration.patch(level="fused", strict=False)
    ours = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)
    theirs = original.apply(hidden, weight, None, targets, 1.0, 32768)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    status = integration.status()
    assert (
        status.calls == {}
        and list(status.delegations.values()) == [1]
        and next(iter(status.delegations))[0] == "fused_head"
    )


def test_unknown_outputs_are_outside_the_domain(head):
    (hidden, weight, _), targets = inputs()
    with pytest.raises(RuntimeError, match=r"unknown outputs \['top_k'\]"):
        head.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("top_k",))


# float64 and fp16, margins where exp overflows, and no pair at all.
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, (7,)), (torch.float64, (2, 3)), (torch.float16, (5,)), (torch.float32, (0,))]
)
def test_logsigmoid_of_the_reward_trainer_is_elementwise_and_differentiable(dtype, shape):
    from trl.trainer import reward_trainer

    integration.patch(level="pairs")
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(dtype)
    if x.numel() > 2:
        x.view(-1)[:2] = torch.tensor([400.0, -400.0])
    x.requires_grad_()
    twin = x.detach().double().requires_grad_()
    value, truth = reward_trainer.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(twin)
    assert value.shape == x.shape and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-12)
    upstream = torch.randn(shape)
    (value * upstream).sum().backward()
    (truth * upstream).sum().backward()
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    assert reward_trainer.nn.Module is torch.nn.Module and reward_trainer.nn.functional.relu is torch.nn.functional.relu
    assert integration.status().calls == {"reward_pairs": 1}


def test_at_level_logits_the_public_functions_reach_our_kernel(monkeypatch):
    def fused(logits, index, temperature=1.0, row_mask=None):
        raise AssertionError("TRL's own kernel ran")

    fused = types.FunctionType(fused.__code__, {"__name__": "trl.kernels.logprob_entropy"}, argdefs=(1.0, None))
    monkeypatch.setattr(utils, "_fused_logprob_entropy", fused, raising=False)
    # TRL takes this road on a GPU with Triton only; its own checks are opened here so that a CPU takes it too.
    monkeypatch.setattr(utils, "is_triton_available", lambda: True)
    monkeypatch.setattr(utils, "_supports_trl_loss_kernel", lambda *args: True)
    stock = utils.selective_log_softmax_and_entropy
    replaced = integration.patch(level="logits").replaced
    assert "trl.trainer.utils._fused_logprob_entropy -> rlkernels (fused logits)" in replaced
    torch.manual_seed(1)
    logits, index = torch.randn(2, 5, 33, requires_grad=True), torch.randint(0, 33, (2, 5))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    # TRL's own function, as a user's module holds it that took it by name before the patch.
    logprobs, entropy = stock(logits, index, temperature=0.7, row_mask=mask)
    assert integration.status().calls == {"logprob_entropy": 1}
    log_p = (logits.detach().double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(
        logprobs.double(), log_p.gather(-1, index[..., None])[..., 0] * mask, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1) * mask, rtol=1e-5, atol=1e-6)
    logprobs.sum().backward()
    assert not logits.grad[mask == 0].any() and logits.grad[mask == 1].any(-1).all()
    integration.unpatch()
    assert utils._fused_logprob_entropy is fused


NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")


def test_at_level_logits_every_holder_of_the_three_functions_gets_ours_and_is_restored():
    from trl.experimental.tpo import tpo_trainer

    before = {name: getattr(utils, name) for name in NAMES}
    assert tpo_trainer.selective_log_softmax_and_entropy is before["selective_log_softmax_and_entropy"]
    report = integration.patch(level="logits")
    assert all(getattr(utils, name) is not held for name, held in before.items())
    assert tpo_trainer.selective_log_softmax_and_entropy is utils.selective_log_softmax_and_entropy
    assert hasattr(utils, "_fused_logprob_entropy") or "only with Triton" in report.skipped[0]
    integration.unpatch()
    assert all(getattr(utils, name) is held for name, held in before.items())
    assert tpo_trainer.selective_log_softmax_and_entropy is before["selective_log_softmax_and_entropy"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_on_a_cpu_are_trls_own_bits_unless_fp32_is_asked_for(dtype):
    torch.manual_seed(2)
    logits, index = torch.randn(2, 5, 33).to(dtype), torch.randint(0, 33, (2, 5))
    stock = utils.selective_log_softmax(logits, index)
    assert integration.patch(level="logits").host.startswith("TRL")
    assert torch.equal(utils.selective_log_softmax(logits, index), stock)
    ((name, reason),) = integration.status().delegations
    assert name == "selective_log_softmax" and "TRL's own bits" in reason and integration.status().calls == {}
    integration.patch(level="logits", logits_dtype=torch.float32)
    truth = logits.double().log_softmax(-1).gather(-1, index[..., None])[..., 0]
    assert (utils.selective_log_softmax(logits, index) - truth).abs().max() < 1e-6 < (stock - truth).abs().max()
    assert integration.status().calls == {"selective_log_softmax": 1}


def test_a_dtype_of_logits_rounds_those_of_the_head_as_trl_does():
    (hidden, weight, _), targets = inputs(dtype=torch.bfloat16)
    integration.patch(level="fused", logits_dtype=torch.bfloat16)
    ours = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)[0]
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)[0]
    assert (ours - theirs).abs().max() < 2e-5
    with pytest.raises(ValueError, match="logits_dtype must be None or one of .* got torch.int8"):
        integration.patch(logits_dtype=torch.int8)


# Seven arguments up to TRL 1.12, eight in 1.13 and 1.14; both return a pair.
@pytest.mark.fault(110)
@pytest.mark.parametrize("biased", [False, True])
def test_the_heads_of_older_versions_are_found_by_their_parameters_and_return_a_pair(biased, monkeypatch):
    def seven(
        ctx, last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        raise AssertionError("TRL's own head ran")

    def eight(
        ctx, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        raise AssertionError("TRL's own head ran")

    old = type("_ChunkedLogProbFunction", (), {"forward": staticmethod(eight if biased else seven)})
    old.__module__ = "trl.trainer.utils"
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", old)
    integration.patch(level="fused")
    (hidden, weight, bias), targets = inputs()
    of_head = (bias,) if biased else ()
    found = utils._ChunkedLogProbFunction.apply(hidden, weight, *of_head, targets, 0.7, 64, 5.0, 0.25)
    twins = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = reference(*twins[:2], twins[2] if biased else None, targets, 0.7, 5.0, 0.25)[:2]
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)
    (found[0].sum() + found[1].sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    torch.testing.assert_close(hidden.grad.double(), twins[0].grad, rtol=1e-4, atol=2e-5)
    assert integration.status().calls == {"fused_head": 1}
    integration.unpatch()
    assert utils._ChunkedLogProbFunction is old


def test_entropy_of_no_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match="entropy_from_logits: logits must be a torch.Tensor"):
        integration.functions.entropy_from_logits(None)
