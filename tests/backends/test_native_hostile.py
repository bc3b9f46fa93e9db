"""Faults at the door to native code: F121 and F123 (who reads addresses again), F122, F132, F143."""

import pytest
import subprocesses
import torch
from flat_backend import Flat
from present_backends import native
from reference import draw_rows, same_bits
from torch.testing._internal.two_tensor import TwoTensor

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import cpu

# F123, F121 -----------------------------------------------------------------------------------------------------------

WRITER = """
    import sys
    import threading
    import time
    import torch
    import rlkernels as rlk
    from rlkernels import ops

    backend, name = sys.argv[1:]
    rows = 20000
    x, targets = torch.randn(rows, 8), torch.zeros(rows, dtype=torch.int64)
    temperature = torch.ones(rows)
    offsets = torch.arange(0, rows + 1, 4)
    values = torch.randn(rows)
    CALLS = {
        "targets": (targets, 2**40, lambda: rlk.token_logprobs(x, targets)),
        "targets of a policy": (targets, 2**40,
                                lambda: rlk.logits_policy_loss(x, targets, torch.zeros(rows), torch.ones(rows))),
        "targets of a head": (targets, 2**40, lambda: rlk.linear_token_logprobs(x, torch.ones(16, 8), targets)),
        "offsets": (offsets, 2**40, lambda: rlk.gae(values, values, cu_seqlens=offsets)),
        "offsets of the op": (offsets, 2**40,
                              lambda: ops.gae(values, values, None, offsets, 1.0, 1.0, "skip", backend)),
    }
    changed, far, call = CALLS[name]
    right, done = changed.clone(), False

    def write():
        while not done:
            changed[rows // 5] = far
            changed[rows // 5] = right[rows // 5]

    with rlk.use_backend(backend):
        want = call()
        thread = threading.Thread(target=write, daemon=True)  # a failure ends the process
        thread.start()
        seen, end = set(), time.monotonic() + 2.0
        while time.monotonic() < end:
            try:
                got = call()
            except (IndexError, ValueError, RuntimeError) as error:
                seen.add(type(error).__name__)
            else:
                pairs = zip(got, want) if isinstance(got, tuple) else [(got, want)]
                assert all(torch.equal(a, b) for a, b in pairs), "a number that belongs to neither"
                seen.add("value")
        done = True
        thread.join()
    print(*sorted(seen))
"""


@pytest.mark.fault(123)
@pytest.mark.parametrize(
    "name", ["targets", "targets of a policy", "targets of a head", "offsets", "offsets of the op"]
)
def test_what_another_thread_writes_in_between_raises_or_changes_nothing(name, backend):
    done = subprocesses.code(WRITER, backend, name, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "value" in done.stdout or "Error" in done.stdout


@pytest.mark.fault(123)
@native
def test_a_batch_keeps_the_targets_and_temperatures_that_it_looked_at(monkeypatch):
    x, targets, _ = draw_rows((5,), 37)
    targets, temperature = targets.clamp(min=0), torch.rand(5) + 0.5
    want, inner = Flat(cpu).token_stats(x, targets, temperature, -100, None, None, 0), cpu._batch

    def batch(rows):
        made = inner(rows)
        targets.fill_(2**40)
        temperature.fill_(-1.0)
        return made

    monkeypatch.setattr(cpu, "_batch", batch)
    assert all(
        same_bits(a, b)
        for a, b in zip(Flat(cpu).token_stats(x, targets, temperature, -100, None, None, 0), want, strict=True)
    )


BAD_OFFSETS = {
    "beyond the end": [0, 4, 80],
    "far beyond the end": [0, 4, 10**8],
    "decreasing": [0, 6, 3, 8],
    "not from 0": [1, 4, 8],
    "negative": [0, -4, 8],
    "before the end": [0, 4, 7],
    "one": [8],
}


@pytest.mark.fault(121)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", BAD_OFFSETS)
def test_the_scan_itself_refuses_offsets_that_point_elsewhere(name, dtype, backend):
    x, offsets = torch.randn(8), torch.tensor(BAD_OFFSETS[name], dtype=dtype)
    for call in (ops.gae, lambda *a: ops.gae.op(*a[:4], ops.number(a[4]), ops.number(a[5]), *a[6:])):
        with pytest.raises(
            ValueError,
            match=r"gae: cu_seqlens (starts|decreases|ends) .*expected|gae: cu_seqlens "
            r".*must hold cumulative lengths",
        ):
            call(x, x, None, offsets, 1.0, 1.0, "skip", backend)


# F122 -----------------------------------------------------------------------------------------------------------------


class Int8(torch.Tensor):
    """A weight in 8 bits with one scale a row, as quantising libraries make them: it knows a few of
    torch's operations.
    """

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if str(function) in ("aten.detach.default", "aten.alias.default"):
            return Int8(args[0].codes, args[0].scale)
        return NotImplemented


def heads():
    hidden, weight, targets = torch.randn(6, 16), torch.randn(32, 16), torch.arange(6)
    cu = torch.tensor([0, 3, 6])
    losses = {
        "linear_policy_loss": lambda h, w: rlk.linear_policy_loss(h, w, targets, torch.zeros(6), torch.ones(6)),
        "linear_sft_loss": lambda h, w: rlk.linear_sft_loss(h, w, targets),
        "linear_dpo_loss": lambda h, w: rlk.linear_dpo_loss(h, w, targets, cu_seqlens=cu, reference_free=True),
        "linear_unpaired_preference_loss": lambda h, w: rlk.linear_unpaired_preference_loss(
            h, w, targets, torch.zeros(2), torch.tensor([True, False]), cu_seqlens=cu, kl=0.0
        ),
        "linear_token_logprobs": lambda h, w: rlk.linear_token_logprobs(h, w, targets),
        "linear_token_stats": lambda h, w: rlk.linear_token_stats(h, w, targets).entropy,
    }
    return hidden, weight, losses


HEADS = tuple(heads()[2])


@pytest.mark.fault(122)
@pytest.mark.parametrize("name", HEADS)
def test_a_subclass_that_keeps_its_data_elsewhere_is_dispatched_or_refused_by_name(name, backend):
    hidden, weight, losses = heads()
    want = losses[name](hidden, weight)
    for argument, h, w in (
        ("weight", hidden, TwoTensor(weight, weight.clone())),
        ("hidden", TwoTensor(hidden, hidden.clone()), weight),
    ):
        if name.startswith("linear_token"):
            got = losses[name](h, w)
            assert type(got) is TwoTensor and same_bits(got.a, want) and same_bits(got.b, want)
        else:
            with pytest.raises(
                TypeError, match=f"{name}: {argument} is a TwoTensor, .*pass a plain tensor, such as its dequantize"
            ):
                losses[name](h, w)
    coded = Int8(torch.randint(-100, 100, (32, 16), dtype=torch.int8), torch.rand(32, 1))
    with pytest.raises(TypeError, match=f"{name}: weight is a Int8, .*pass a plain tensor, such as its dequantize"):
        losses[name](hidden, coded)
    assert losses[name](hidden, coded.dequantize()).isfinite().all()


@pytest.mark.fault(122)
@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_token_stats", "linear_sft_loss"])
def test_targets_that_keep_their_data_elsewhere_are_refused_by_name(name):
    # A head looks for the rows that live.
    targets, operands = torch.tensor([1, 2, 0]), (torch.randn(3, 4), torch.randn(5, 4))
    with pytest.raises(
        TypeError, match=f"^{name}: targets is a TwoTensor, a tensor subclass that keeps its data in other tensors"
    ):
        getattr(rlk, name)(*operands, TwoTensor(targets, targets.clone()))


@pytest.mark.fault(122)
def test_offsets_that_keep_their_data_elsewhere_are_refused_by_name():
    offsets = torch.tensor([0, 2, 3])
    with pytest.raises(
        TypeError,
        match="^sequence_sums: cu_seqlens is a TwoTensor, a tensor subclass that keeps its data in other tensors",
    ):
        rlk.sequence_sums(torch.ones(3), None, TwoTensor(offsets, offsets.clone()))


@pytest.mark.fault(122)
@pytest.mark.parametrize("argument", ["mask", "advantages", "weights"])
def test_a_head_takes_no_rows_from_what_keeps_its_data_elsewhere(argument):
    x = torch.rand(3, 2)
    given = {"mask": torch.ones(3, 2, dtype=torch.bool), "advantages": x, "weights": x}
    given[argument] = TwoTensor(given[argument], given[argument].clone())
    with pytest.raises(TypeError, match="^linear_policy_loss: a mask, weights or advantages are a TwoTensor"):
        rlk.linear_policy_loss(
            torch.randn(3, 2, 4), torch.randn(5, 4), torch.zeros(3, 2, dtype=torch.long), -x, **given
        )


@pytest.mark.fault(122)
@pytest.mark.parametrize("name", HEADS)
def test_a_pending_negation_of_a_head_is_carried_out(name, backend):
    hidden, weight, losses = heads()
    for of_hidden, of_weight in ((True, False), (False, True), (True, True)):
        bent = [
            torch.complex(torch.zeros_like(x), -x).conj().imag.requires_grad_() if turn else x.clone().requires_grad_()
            for x, turn in ((hidden, of_hidden), (weight, of_weight))
        ]
        assert [x.is_neg() for x in bent] == [of_hidden, of_weight]
        plain = [x.clone().requires_grad_() for x in (hidden, weight)]
        got, want = losses[name](*bent), losses[name](*plain)
        assert same_bits(got.detach(), want.detach())
        for a, b in zip(torch.autograd.grad(got.sum(), bent), torch.autograd.grad(want.sum(), plain), strict=True):
            assert same_bits(a.resolve_neg(), b)


# F132 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(132)
def test_a_loss_beyond_fp32_is_infinite(backend):
    large = torch.full((4,), 3e38)
    logp, old, advantage = torch.full((2, 4), 88.0, requires_grad=True), torch.zeros(2, 4), -torch.ones(2, 4)
    loss = rlk.policy_loss(logp, old, advantage, aggregation="token-sum", clip_low=0.2, clip_high=0.2)
    assert loss == torch.inf and loss.dtype == torch.float32
    loss.backward()
    assert logp.grad.isfinite().all() and logp.grad.any()
    assert rlk.value_loss(large, large, -large, aggregation="token-sum") == torch.inf
    assert ops.elementwise("nll", -large, [], (), None, backend)[0] == torch.inf
    assert ops.elementwise("nll", large, [], (), torch.ones(4), backend)[0] == -torch.inf
    assert (
        rlk.sft_loss(torch.tensor([[0.0, 3e38], [0.0, 3e38]]), torch.tensor([0, 0]), aggregation="token-sum")
        == torch.inf
    )
    wide = torch.full((4,), 3e38, dtype=torch.float64)
    assert ops.elementwise("nll", -wide, [], (), None, backend)[0] == 1.2e39  # fp64 holds it


@pytest.mark.fault(132)
def test_a_parameter_beyond_fp32_is_infinite(backend):
    x = torch.tensor([2.0, -1.0])
    value = ops.elementwise("ppo_clip", x, [torch.zeros(2), torch.ones(2)], (0.2, 1e39), None, backend)[1]
    torch.testing.assert_close(value, -torch.exp(x))  # an upper bound that is never reached


# F143 -----------------------------------------------------------------------------------------------------------------

FLUSHED = """
    import torch
    import rlkernels as rlk
    from rlkernels import ops
    from rlkernels.backends import cpu_matmul

    assert torch.set_flush_denormal(True), "this processor has no such mode"
    rows, vocab = 96, 1024
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, vocab, generator=draw).mul_(3)
    targets = torch.randint(vocab, (rows,), generator=draw)
    tiny = torch.full((rows,), 2e-36)
    columns = torch.randn(2, 3 * 4096, generator=draw).mul_(1e-38)
    a, b = torch.randn(256, 64, generator=draw).mul_(1e-20), torch.randn(64, 192, generator=draw).mul_(1e-19)

    def everything():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rlk.token_logprobs(leaf, targets), leaf, tiny)
        loss = rlk.logits_policy_loss(leaf, targets, torch.zeros(rows), torch.ones(rows), weights=tiny)
        (fused,) = torch.autograd.grad(loss, leaf)
        wide = x.double().mul_(80).requires_grad_()
        tiny64 = torch.full((rows,), 1e-300, dtype=torch.float64)
        (double,) = torch.autograd.grad(rlk.token_logprobs(wide, targets), wide, tiny64)
        halves = torch.full_like(columns[0], 0.5)
        found = [gradient, fused, double, *ops.elementwise("k2", columns[0], [columns[1]], (), halves, "cpu")]
        return found + ([cpu_matmul.mm(a, b, torch.empty(256, 192))] if cpu_matmul.fp32_available() else [])

    torch.set_num_threads(1)
    want = everything()
    assert all((x[x != 0].abs() >= torch.finfo(x.dtype).tiny).all() for x in want), "a subnormal number"
    assert all((want[k] == 0).any() for k in (0, 1, 2))
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert all(torch.equal(p, q) for p, q in zip(everything(), want)), threads
    # The pool's threads are left as they were found: torch's own sums of subnormal numbers are what they would be
    # without us.
    assert torch.set_flush_denormal(False)
    torch.set_num_threads(4)
    kept = torch.full((1 << 20,), 1e-40)
    assert (kept * 1.0 == kept).all() and (everything()[0] != want[0]).any()
    print("the same")
"""


@pytest.mark.fault(143)
@native
def test_flushed_subnormal_numbers_are_flushed_by_every_thread():
    done = subprocesses.code(FLUSHED, OMP_NUM_THREADS="4")
    if "this processor has no such mode" in done.stderr:
        pytest.skip("torch.set_flush_denormal is refused by this processor")
    assert done.stdout.strip() == "the same", done.stderr
