"""What rounding the gradient of the logits to bf16 took from its largest elements is given back."""

import sys

import pytest
import subprocesses
import torch

from rlkernels.backends import cpu, cpu_matmul, cpu_memory

pytestmark = pytest.mark.skipif(not cpu_matmul.available(), reason="no AVX512_BF16 here")


def rows(count, vocab, kind, seed=0):
    """Gradients of log-probabilities, ``g (onehot - p)``: spread, with one strong rival of the target, or peaked on
    five tokens.
    """
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=draw, dtype=torch.float64) * 2
    y = torch.randint(vocab, (count,), generator=draw)
    logits[:, {"spread": [], "rival": [3], "five": [3, 9, 20, 31, 40]}[kind]] += 14.0
    g = torch.randn(count, 1, generator=draw, dtype=torch.float64)
    return (g * (torch.nn.functional.one_hot(y, vocab) - logits.softmax(-1))).float()


def operands(count, vocab, width, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(vocab, width, generator=draw).bfloat16(), torch.randn(count, width, generator=draw).bfloat16()


def gradients(d, weight, hidden, repair):
    dhidden, dweight = torch.empty(hidden.shape), torch.empty(weight.shape)
    cpu_matmul.mm(d, weight, dhidden)
    cpu_matmul.mm(d.t(), hidden, dweight)
    if repair:
        cpu_matmul.add_what_rounding_lost(d, weight, hidden, dhidden, dweight)
    return dhidden, dweight


@pytest.mark.parametrize("kind", ["spread", "rival", "five"])
def test_with_the_repair_the_gradients_err_by_a_third_of_one_rounding_at_most(kind):
    d = rows(40, 3001, kind)
    weight, hidden = operands(40, 3001, 48)
    truth = d.double() @ weight.double(), d.double().t() @ hidden.double()
    once = [((t.bfloat16().double() - t).norm() / t.norm()).item() for t in truth]
    errors = {
        repair: [
            ((g.double() - t).norm() / t.norm()).item()
            for g, t in zip(gradients(d, weight, hidden, repair), truth, strict=True)
        ]
        for repair in (False, True)
    }
    # 1.05 roundings in all leave sqrt(1.05^2 - 1) = 0.32 of one for this.
    assert all(e <= 0.32 * o for e, o in zip(errors[True], once, strict=True)), (errors, once)
    assert all(e >= 0.6 * o for e, o in zip(errors[False], once, strict=True)), (
        "the repair was not needed, so this test shows nothing"
    )


def test_it_adds_exactly_what_rounding_took_from_the_largest_elements():
    d = torch.zeros(2, 200)
    d[0, 7], d[0, 150], d[0, 9] = 1.001, -0.5003, 1.0 / 64 + 1e-5  # the last one is below 1/32 of the first
    d[1, 7] = -3.0003
    weight, hidden = operands(2, 200, 5)
    dhidden, dweight = torch.zeros(2, 5), torch.zeros(200, 5)
    cpu_matmul.add_what_rounding_lost(d, weight, hidden, dhidden, dweight)
    lost = d - d.bfloat16().float()
    lost[0, 9] = 0.0
    torch.testing.assert_close(dhidden.double(), lost.double() @ weight.double(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(dweight.double(), lost.double().t() @ hidden.double(), rtol=1e-5, atol=1e-9)
    assert lost[0, 7] != 0 and lost[1, 7] != 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_row_that_is_not_finite_or_is_zero_is_left_alone_and_the_others_are_not(bad):
    d = rows(3, 100, "rival")
    clean = d.clone()
    d[1] = 0.0
    d[1, 4] = bad
    weight, hidden = operands(3, 100, 8)
    got, expected = ((torch.zeros(3, 8), torch.zeros(100, 8)) for _ in range(2))
    cpu_matmul.add_what_rounding_lost(d, weight, hidden, *got)
    clean[1] = 0.0
    cpu_matmul.add_what_rounding_lost(clean, weight, hidden, *expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bits_do_not_depend_on_threads_and_strides():
    d = rows(30, 500, "five")
    d[:, 11] = d[:, 3]  # many rows meet in one token
    weight, hidden = operands(30, 500, 33)
    wide = torch.full((30, 512), float("nan"))
    wide[:, :500] = d
    before, results = torch.get_num_threads(), []
    try:
        for threads, x in ((1, d), (2, d), (3, wide[:, :500])):
            torch.set_num_threads(threads)
            out = torch.zeros(30, 33), torch.zeros(500, 33)
            cpu_matmul.add_what_rounding_lost(x, weight, hidden, *out)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_frozen_is_left_out():
    d = rows(4, 100, "spread")
    weight, hidden = operands(4, 100, 8)
    both = torch.zeros(4, 8), torch.zeros(100, 8)
    cpu_matmul.add_what_rounding_lost(d, weight, hidden, *both)
    alone = torch.zeros(4, 8), torch.zeros(100, 8)
    cpu_matmul.add_what_rounding_lost(d, weight, hidden, alone[0], None)
    cpu_matmul.add_what_rounding_lost(d, weight, hidden, None, alone[1])
    assert torch.equal(both[0], alone[0]) and torch.equal(both[1], alone[1]) and both[0].any() and both[1].any()


@pytest.mark.skipif(not cpu.available()[0], reason="the native backend is absent")
def test_three_freed_buffers_are_kept_for_the_next_call_and_given_back_on_request():
    cpu_memory.release_memory()
    sizes = [(34 << 18,), (40 << 18,), (70 << 18,), (90 << 18,)]  # fp32: 34 to 90 MiB
    addresses = []
    for size in sizes:
        x = cpu_memory.empty(size, torch.float32)
        addresses.append(x.data_ptr())
        keep = [cpu_memory.empty(s, torch.float32) for s in sizes[:1]]
        del x, keep
    assert cpu_memory.kept_bytes() <= (90 + 70 + 40) << 20
    again = cpu_memory.empty(sizes[3], torch.float32)
    assert again.data_ptr() == addresses[3], "the smallest that fits is taken again"
    del again
    cpu_memory.release_memory()
    assert cpu_memory.kept_bytes() == 0


RESIDENT = """
    import torch
    from rlkernels.backends import cpu, cpu_memory

    def resident():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024

    before = resident()
    held = cpu_memory.empty((200 << 18,), torch.float32).zero_()
    del held
    for size in (20, 90):  # below and above what is taken from a kept block; neither fits into the one of 200 MiB
        x = cpu_memory.empty((size << 18,), torch.float32).zero_()
        print(resident() - before)
        del x
"""


@pytest.mark.skipif(not cpu.available()[0], reason="the native backend is absent")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc and MADV_FREE")
def test_new_memory_takes_its_room_from_what_is_kept():
    done = subprocesses.code(RESIDENT)
    assert done.returncode == 0, done.stderr
    assert all(int(line) <= 208 for line in done.stdout.split()) and len(done.stdout.split()) == 2, done.stdout


@pytest.mark.skipif(not cpu.available()[0], reason="the native backend is absent")
def test_a_measurement_of_memory_can_have_large_tensors_come_from_torch():
    cpu_memory.release_memory()
    with (
        cpu_memory.torchs_memory(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        x = cpu_memory.empty((34 << 18,), torch.float32)
    seen = sum(
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    )
    assert seen >= 34 << 20
    del x
    assert cpu_memory.kept_bytes() == 0, "it was not one of ours"
    ours = cpu_memory.empty((34 << 18,), torch.float32)
    del ours
    assert cpu_memory.kept_bytes() >= 34 << 20
    cpu_memory.release_memory()
