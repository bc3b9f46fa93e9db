"""The launches of the shipped host code, through a stand-in for the CUDA runtime: grid, cluster, shared memory, stream,
device, and what happens when a call fails.
"""

import json
from pathlib import Path

import host_build
import pytest
import torch
from entered_functions import entered
from flat_backend import Flat
from reference import same_bits
from test_cuda_policy import call, problem

import rlkernels
from benchmarks.gpu_model import launch_shapes
from benchmarks.gpu_model.host import calls
from rlkernels.backends import cuda

LIMIT = 227 * 1024  # of shared memory per block, and per multiprocessor but for 1 KB


@pytest.fixture
def runtime(backend, host_module):
    found = host_build.Runtime(host_module[0].__file__)
    found.record()
    return found


@pytest.fixture
def elsewhere(runtime, monkeypatch):
    """Tensors on the second device, with a stream that is not the default one."""
    monkeypatch.setattr(cuda, "_stream", lambda tensor: (1, 77))
    return runtime


def launches(runtime):
    return [made for made in runtime.record() if made["call"] == "launch"]


def as_supposed(launch):
    """What the model of ``benchmarks/gpu_model`` supposes of a launch, as the stand-in for the runtime notes one."""

    return {"threads": launch.threads, "shared": launch.shared, "cluster": launch.cluster}


def stats(backend, case):
    x, targets = case[:2]
    return Flat(backend).token_stats(x, targets, 0.8, -100, None, None, 1)


def backward(backend, case, upstream, unless=None, out=None):
    x, targets = case[:2]
    logp, row_max, sum_exp, entropy = stats(backend, case)[:4]
    return Flat(backend).token_stats_backward(
        upstream,
        None,
        None,
        x,
        targets,
        0.8,
        -100,
        None,
        None,
        row_max,
        sum_exp,
        entropy,
        None,
        None,
        None,
        out,
        unless,
    )


def column_calls(backend):
    x = torch.linspace(-1, 1, 3000)
    return {
        "elementwise": lambda: backend.elementwise("value_plain", [x, x], [], None),
        "gae": lambda: backend.gae(x[None], x[None], None, None, 0.9, 0.9, "none"),
    }


@pytest.mark.fault(45)
def test_every_launch_is_on_the_device_and_the_stream_of_its_tensors_and_the_device_is_put_back(elsewhere, backend):
    case = problem(1031, torch.bfloat16)
    call(backend, "ppo_clip", case)
    backward(backend, case, torch.ones(5))
    for run in column_calls(backend).values():
        run()
    made = elsewhere.record()
    assert sum(m["call"] == "launch" for m in made) == 5 and sum(m["call"] == "memset" for m in made) >= 1
    assert {(m["device"], m["stream"]) for m in made} == {(1, 77)}
    assert elsewhere.device == 0


@pytest.mark.parametrize("vocab", (1, 32000, 65536, 128256, 151936, 262144, 500_000))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_the_row_of_a_fused_launch_fits_its_cluster(runtime, backend, dtype, vocab):
    case = problem(vocab, dtype, rows=1)
    case[4][:] = 0.0  # a row without any weight: the launch is the same, and takes no time
    case[5][:] = case[6][:] = 0.0
    call(backend, "ppo_clip", case)
    (made,) = launches(runtime)
    assert made["blocks"] == made["cluster"] in (1, 2, 4, 8) and made["shared"] <= LIMIT
    kept = made["shared"] - 1344  # records and the sum over rows
    row = vocab * dtype.itemsize
    assert kept == 0 or row <= kept * made["cluster"] <= row + made["cluster"] * 1024 * 8 * dtype.itemsize
    assert kept > 0 or row > 8 * (LIMIT - 1344 - 1024) - 8192 * dtype.itemsize
    assert as_supposed(launch_shapes.fused_policy(vocab, dtype.itemsize, dtype.itemsize)).items() <= made.items()


@pytest.mark.parametrize("vocab, blocks", ((32000, 1), (65536, 2), (128256, 4), (151936, 8)))
def test_twenty_warps_of_bf16_rows_run_on_a_multiprocessor_of_sm_90(runtime, backend, vocab, blocks):
    """With the shared memory of the launch, and the registers that nvcc has been recorded to take."""
    case = problem(vocab, torch.bfloat16, rows=1)
    case[4][:] = case[5][:] = case[6][:] = 0.0
    call(backend, "ppo_clip", case)
    (made,) = launches(runtime)
    name = f"fused_policy<bf16,bf16,{made['threads']},{made['cluster']},1>"
    registers = json.loads((host_build.HERE / "registers.json").read_text())["registers"][name]["sm_90a"]
    by_registers = 65536 // (-(-registers // 8) * 8 * made["threads"])
    by_memory = (LIMIT + 1024) // (made["shared"] + 1024)
    assert made["cluster"] == blocks and min(by_registers, by_memory) * made["threads"] // 32 >= 20


def test_the_other_kernels_are_launched_as_the_model_supposes(runtime, backend):
    case = problem(33333, torch.bfloat16, rows=1)
    stats(backend, case)
    Flat(backend).token_stats(case[0], case[1], 0.8, -100, None, case[0].clone(), 17)
    backward(backend, case, torch.ones(1))
    column_calls(backend)["gae"]()
    one, two, _, slices, scan = launches(runtime)
    supposed = (
        (one, launch_shapes.token_stats(2, False)),
        (two, launch_shapes.token_stats(2, True)),
        (slices, launch_shapes.token_stats_backward(2, 2)),
        (scan, launch_shapes.gae()),
    )
    for made, launch in supposed:
        assert as_supposed(launch).items() <= made.items(), launch
    assert slices["blocks"] == -(-33333 // launch_shapes.SLICE)


def test_shared_memory_is_asked_for_whole_where_a_row_is_kept_in_it(runtime, backend):
    for vocab in (24000, 33333):
        call(backend, "ppo_clip", problem(vocab, torch.bfloat16, rows=1))
    stats(backend, problem(33333, torch.bfloat16, rows=1))
    one, two, alone = launches(runtime)
    assert one["cluster"] == 1 and one["shared"] > 48 * 1024 and one["carveout"] == 100
    assert two["cluster"] == 2 and two["shared"] < 48 * 1024 and two["carveout"] == 100
    assert alone["shared"] < 2048 and alone["carveout"] == -1


def test_a_backward_pass_that_may_have_nothing_to_do_launches_few_blocks_and_writes_the_same_bits(runtime, backend):
    case, upstream = problem(1030, torch.bfloat16, rows=8), torch.linspace(-1, 1, 8)
    cuda._cuda.choose(0, 8)  # columns per block: 129 slices of each row
    expected = backward(backend, case, upstream)
    (_, every) = launches(runtime)
    assert every["blocks"] == 8 * 129
    old = torch.full_like(case[0], 7.0)
    assert same_bits(backward(backend, case, upstream, torch.tensor(1.0), old.clone()), old)
    assert same_bits(backward(backend, case, upstream, torch.tensor(0.5), old.clone()), expected)
    assert [made["blocks"] for made in launches(runtime)][1::2] == [4 * 132] * 2, "each behind its statistics"
    cuda._cuda.choose(0, 0)
    backward(backend, case, upstream, torch.tensor(1.0), old.clone())
    assert launches(runtime)[-1]["blocks"] == 8, "never more blocks than slices"


@pytest.mark.parametrize("name", ("token_stats", "token_stats_backward", "fused_policy", "elementwise", "gae"))
def test_no_launch_holds_pythons_lock(runtime, backend, name):
    """A full queue makes a launch wait, and no other thread of Python may wait with it."""
    case = problem(257, torch.float32)
    run = {
        "token_stats": lambda: stats(backend, case),
        "token_stats_backward": lambda: backward(backend, case, torch.ones(5)),
        "fused_policy": lambda: call(backend, "ppo_clip", case),
        **column_calls(backend),
    }[name]
    run()
    made = runtime.record()
    assert made and not any(m["lock"] for m in made)


@pytest.mark.parametrize("failing", host_build.CUDA_CALLS)
def test_an_error_of_any_call_names_the_kernel_and_leaves_the_device_as_it_was(elsewhere, backend, failing):
    case = problem(24000, torch.bfloat16, rows=1)
    elsewhere.fail(failing)
    with pytest.raises(RuntimeError, match="^fused_policy<bfloat16>: invalid argument$"):
        call(backend, "ppo_clip", case)
    assert elsewhere.device == 0
    call(backend, "ppo_clip", case)


def test_a_device_that_is_not_there_is_an_error(elsewhere, backend, monkeypatch):
    monkeypatch.setattr(cuda, "_stream", lambda tensor: (9, 0))
    with pytest.raises(RuntimeError, match="^token_stats<float32>: invalid device ordinal$"):
        stats(backend, problem(7, torch.float32))


@pytest.fixture
def idle(runtime):
    """Launches that run no kernel."""
    runtime.runs(False)
    yield runtime
    runtime.runs(True)


# Calls of this package's Python functions from a public call to its return, and launches. They are most of the host's
# time, and unlike it the same on every machine. On CPU tensors the host sees that the gradient of a loss is 1, so the
# backward launches nothing.
HOST = {
    "token_stats [8, 32000]": (52, 1),
    "logits_policy_loss [8, 32000], both ways": (130, 1),
    "policy_loss [64, 32], both ways": (66, 1),
    "gae [64, 32]": (49, 1),
}


@pytest.mark.parametrize("name", HOST)
def test_a_call_takes_its_launches_and_not_a_twentieth_more_python_calls_than_recorded(name, public, idle):
    run = calls()[name]
    run()  # imports, and what is looked up once
    idle.record()
    found = entered(run, str(Path(rlkernels.__file__).parent))
    # Python 3.12 calls no function for a comprehension.
    found = [function for function in found if not function.startswith("<")]
    recorded, made = HOST[name]
    assert len(launches(idle)) == made
    assert 0.9 * recorded <= len(found) <= 1.05 * recorded, sorted(found)
