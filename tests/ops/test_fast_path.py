"""Plain calls skip torch's dispatcher and give what the registered op gives; whatever lives in the dispatcher still
meets the registered op.
"""

import gc
import weakref

import pytest
import torch
from entered_functions import entered
from present_backends import PRESENT
from reference import draw_rows, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlkernels as rlk
from rlkernels import ops
from rlkernels.tracing import gradient_wanted

V = 37


def calls(backend, dtype=torch.float32):
    """Op to its arguments, the first input of each a leaf; numbers as floats and tuples."""
    x, targets, mask = draw_rows((5,), V, dtype)
    column, other, weight = torch.linspace(-1, 1, 5), torch.linspace(2, -2, 5), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    grid = torch.linspace(-1, 1, 15).view(3, 5)
    return {
        "token_stats": (
            ops.token_stats_op,
            (x.requires_grad_(), targets, 0.7, -100, mask, x.detach().flip(-1), ops.ENTROPY | ops.KL, False, backend),
        ),
        "token_stats per row": (
            ops.token_stats_op,
            (x, targets, weight + 0.5, -100, None, None, ops.ENTROPY, False, backend),
        ),
        "fused_policy": (
            ops.fused_policy_op,
            (
                "ppo_clip",
                x,
                targets,
                0.7,
                -100,
                None,
                [column - 3, other],
                (0.2, 0.28),
                weight,
                weight,
                "k3",
                column - 3,
                weight,
                False,
                False,
                backend,
            ),
        ),
        "elementwise": (
            ops.elementwise,
            ("ppo_clip", column.clone().requires_grad_(), [column - 0.1, other], (0.2, 0.28), weight, backend),
        ),
        "elementwise unweighted": (
            ops.elementwise,
            ("k2", column.clone().requires_grad_(), [other], (), None, backend),
        ),
        "weighted_loss": (
            ops.weighted_loss,
            (
                "pairwise",
                column.clone().requires_grad_(),
                other,
                column,
                [],
                (),
                weight > 0,
                torch.tensor(4),
                0.3,
                backend,
            ),
        ),
        "gae": (ops.gae, (grid, grid.flip(0).contiguous(), grid > -0.5, None, 0.9, 0.95, "skip", backend)),
    }


CALLS = list(calls("eager"))


def as_registered(arguments):
    return [ops.number(a) if isinstance(a, float) else ops.numbers(a) if isinstance(a, tuple) else a for a in arguments]


def gradients(outputs, leaf):
    trained = [x for x in outputs if x.requires_grad]
    upstream = [torch.linspace(-1, 2, max(x.numel(), 1))[: x.numel()].view(x.shape) for x in trained]
    return torch.autograd.grad(trained, leaf, upstream) if trained else ()


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_call_has_the_bits_of_the_registered_op(name, backend):
    op, arguments = calls(backend)[name]
    leaf = next((a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad), None)
    assert gradient_wanted(arguments) is (leaf is not None)
    got, want = op(*arguments), op.op(*as_registered(arguments))
    for a, b in zip(got, want, strict=True):
        assert same_bits(a.detach(), b.detach()) and a.requires_grad == b.requires_grad
    for a, b in zip(gradients(got, leaf), gradients(want, leaf), strict=True):
        assert same_bits(a, b) and a.any()
    with torch.no_grad():
        assert all(same_bits(a, b.detach()) and a.grad_fn is None for a, b in zip(op(*arguments), want, strict=True))


class Seen(TorchDispatchMode):
    """The names of the operations that pass."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_dispatch_mode_sees_the_registered_op(name, backend):
    op, arguments = calls(backend)[name]
    want = op(*arguments)
    with Seen() as seen:
        assert gradient_wanted(arguments) is None
        got = op(*arguments)
    assert [n for n in seen.names if n.startswith("rlkernels.")] == [f"rlkernels.{name.split(' ')[0]}.default"]
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(got, want, strict=True))


def test_outside_of_every_mode_the_dispatcher_sees_no_op_of_ours(backend):
    x, targets, _ = draw_rows((5,), V)
    leaf = x.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = rlk.logits_policy_loss(leaf, targets, torch.zeros(5), torch.ones(5))
        (loss + rlk.policy_loss(rlk.token_logprobs(leaf, targets), torch.zeros(5), torch.ones(5))).backward()
    names = [event.name for event in profile.events()]
    assert "aten::sub" in names or "aten::mul" in names
    assert not [n for n in names if n.startswith("rlkernels::")]


def test_fake_traced_and_transformed_calls_meet_the_registered_op(backend):
    x, targets, _ = draw_rows((5,), V)
    with rlk.use_backend(backend):
        with FakeTensorMode() as mode:
            fake = rlk.token_logprobs(mode.from_tensor(x), mode.from_tensor(targets))
        assert type(fake).__name__ == "FakeTensor" and fake.shape == (5,)
        for options in ({}, {"pre_dispatch": True}, {"tracing_mode": "fake"}):
            graph = make_fx(lambda x, y: rlk.token_logprobs(x, y), **options)(x, targets)
            assert "rlkernels.token_stats" in graph.code, options
            assert same_bits(graph(x, targets), rlk.token_logprobs(x, targets))
        traced = torch.jit.trace(lambda x: rlk.token_logprobs(x, targets), x, check_trace=False)
        assert "rlkernels::token_stats" in str(traced.graph)
        each = torch.func.vmap(lambda x: rlk.token_logprobs(x, targets[0]))(x)  # by torch's fallback, row by row
        assert same_bits(each, rlk.token_logprobs(x, targets[:1].expand(5)))
        with pytest.raises(RuntimeError, match="token_logprobs: torch.func.grad, vjp and jacrev are not supported"):
            torch.func.grad(lambda x: rlk.token_logprobs(x, targets).sum())(x)


def test_a_subclass_meets_the_registered_op(backend):
    x, targets, _ = draw_rows((5,), V)
    two = TwoTensor(x, x.flip(0))
    got = rlk.token_logprobs(two, TwoTensor(targets, targets.flip(0)))
    assert gradient_wanted([two]) is None and type(got) is TwoTensor
    assert same_bits(got.a, rlk.token_logprobs(x, targets)) and same_bits(got.b, got.a.flip(0))


def test_a_pending_negation_is_carried_out(backend):
    parts = torch.view_as_complex(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    negated = parts.conj().imag
    assert negated.is_neg() and gradient_wanted([negated]) is False  # plain: the gate resolves it
    with rlk.use_backend(backend):
        got = rlk.policy_loss(negated, torch.zeros(5), torch.ones(5))
        assert same_bits(got, rlk.policy_loss(negated.clone().resolve_neg(), torch.zeros(5), torch.ones(5)))
        columns = [torch.zeros(5), negated]
        assert same_bits(
            ops.elementwise("ppo_clip", torch.zeros(5), columns, (0.2, 0.2), None, backend)[0],
            ops.elementwise(
                "ppo_clip", torch.zeros(5), [torch.zeros(5), negated.resolve_neg()], (0.2, 0.2), None, backend
            )[0],
        )


def test_parameters_and_inference_mode_are_plain(backend):
    x, targets, _ = draw_rows((5,), V)
    with rlk.use_backend(backend):
        want = rlk.token_logprobs(x, targets)
        parameter = torch.nn.Parameter(x.clone())
        rlk.token_logprobs(parameter, targets).sum().backward()
        assert parameter.grad.any()
        with torch.inference_mode():
            inside = rlk.token_logprobs(x.clone(), targets)
        assert inside.is_inference() and same_bits(inside, want)


def test_on_meta_the_fake_answers():
    x, targets, _ = draw_rows((5,), V)
    assert rlk.token_logprobs(x.to("meta"), targets.to("meta")).device.type == "meta"


@pytest.mark.parametrize("name", CALLS[:-1])
def test_saved_tensors_pass_the_hooks(name, backend):
    op, arguments = calls(backend)[name]
    leaf = next(a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad)
    want, packed = gradients(op(*arguments), leaf), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
        outputs = op(*arguments)
    assert len(packed) >= 2
    assert all(same_bits(a, b) for a, b in zip(gradients(outputs, leaf), want, strict=True))


def test_a_context_keeps_nothing_alive_once_the_loss_is_gone(backend):
    x, targets, _ = draw_rows((5,), V)
    leaf = x.requires_grad_()
    gc.collect()
    gc.disable()  # a cycle would wait for the collector, with a gradient of the logits' size in it
    try:
        with rlk.use_backend(backend):
            logits = leaf * 1
            gone = weakref.ref(logits)
            for loss in (
                rlk.logits_policy_loss(logits, targets, torch.zeros(5), torch.ones(5)),
                rlk.token_stats(logits, targets).entropy.sum(),
            ):
                del loss
            del logits
        assert gone() is None
    finally:
        gc.enable()


BUDGETS = {
    "policy_loss": (lambda a, b, m: rlk.policy_loss(a, b, b, m), 90),
    "pairwise_reward_loss": (lambda a, b, m: rlk.pairwise_reward_loss(a, b), 70),
    "value_loss": (lambda a, b, m: rlk.value_loss(a, b, b, m, clip_range=0.2), 84),
    "gae": (lambda a, b, m: rlk.gae(a.detach(), b, m), 60),
    "token_logprobs": (lambda a, b, m: rlk.token_logprobs(a, torch.zeros(4, dtype=torch.long)).sum(), 116),
}
"""Python functions entered by a forward and a backward, torch's own 15 among them; through the registered op a loss of
pairs enters 250.
"""


@pytest.mark.parametrize("name", BUDGETS)
def test_a_small_loss_enters_few_python_functions(name):
    function, most = BUDGETS[name]
    a, b, mask = torch.zeros(4, 8, requires_grad=True), torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool)

    def step():
        out = function(a, b, mask)
        if isinstance(out, torch.Tensor):
            out.backward()

    step()
    found = len(entered(step))
    assert 5 < found <= most, found


@pytest.mark.skipif("cpu" not in PRESENT, reason="counts the calls of one backend")
def test_the_registered_op_enters_far_more():
    first, weight = torch.zeros(8, requires_grad=True), torch.ones(8)
    plain = entered(lambda: ops.elementwise("pairwise", first, [], (), weight, "cpu")[0].backward())
    numbers = ops.numbers(())
    registered = entered(lambda: ops.elementwise.op("pairwise", first, [], numbers, weight, "cpu")[0].backward())
    assert 4 * len(plain) < len(registered), (len(plain), len(registered))
