"""Faults of backends, threads and processes: who runs what, and where the library can be taken."""

import copy
import functools
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from paths import SUPPORT
from present_backends import PRESENT
from reference import draw_rows, same_bits
from trained_functions import V, output_of, problem

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import absent, forced, use_backend

ROOT = Path(rlk.__file__).parent.parent


@pytest.mark.fault(46)
def test_a_forced_backend_refuses_a_device_it_does_not_serve_and_automatic_choice_takes_one_that_does():
    x, targets, _ = draw_rows((3,), V)
    if absent("cpu") is None:
        with (
            use_backend("cpu"),
            pytest.raises(RuntimeError, match="backend 'cpu' does not serve device meta .*token_stats"),
        ):
            rlk.token_logprobs(x.to("meta"), targets.to("meta"))
    before = ops.calls()
    rlk.token_logprobs(x, targets)
    assert ops.calls() - before == {("token_stats", PRESENT[0]): 1}
    assert rlk.available_backends()["serves"]["cpu"]["token_stats"] == PRESENT[0]


@pytest.mark.fault(91)
def test_the_backend_of_the_forward_runs_the_backward_and_both_are_counted(backend):
    d = problem()
    other = next((name for name in PRESENT if name != backend), backend)
    output, leaf = output_of("token_logprobs", d)
    before = ops.calls()
    with use_backend(other):
        torch.autograd.grad(output, leaf, d["a"])
    assert ops.calls() - before == {("token_stats_backward", backend): 1}
    before = ops.calls()
    output, leaf = output_of("logits_policy_loss", d)
    output.backward()
    counted = ops.calls() - before
    assert counted["fused_policy", backend] == 1 and {name for _, name in counted} == {backend}
    assert ("token_stats_backward", backend) not in counted  # the forward had made the gradient already


def child(code, *arguments, root=ROOT, **environment):
    path = os.pathsep.join([str(root), str(SUPPORT)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.fault(58)
def test_the_library_imports_and_runs_without_triton_without_a_compiler_and_without_its_native_module(tmp_path):
    shutil.copytree(
        ROOT / "rlkernels",
        tmp_path / "rlkernels",
        ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", ".ruff_cache"),
    )
    done = child(
        """
        import sys
        sys.modules["triton"] = None
        # An editable install would find the compiled module in the source tree.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
        import torch
        import rlkernels as rlk
        found = rlk.available_backends()
        assert set(found["serves"]["cpu"].values()) == {"eager"}, found
        assert "no C++ compiler" in found["absent"]["cpu"], found
        x = torch.randn(3, 5, requires_grad=True)
        y = torch.tensor([0, 4, 2])
        rlk.logits_policy_loss(x, y, torch.zeros(3), torch.ones(3), objective="reinforce").backward()
        torch.testing.assert_close(x.grad, (x.detach().softmax(-1) - torch.eye(5)[y]) / 3)
        try:
            rlk.use_backend("cpu").__enter__()
        except RuntimeError as error:
            assert "backend 'cpu' is unavailable: " in str(error), error
            print("done")
        """,
        root=tmp_path,
        PATH="",
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]


@pytest.mark.fault(61)
def test_functions_and_results_survive_copying_pickling_and_a_spawned_process():
    d = problem()
    loss = functools.partial(rlk.policy_loss, objective="ppo_clip", clip_high=0.28)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert same_bits(again(d["a"], d["b"], d["c"]), loss(d["a"], d["b"], d["c"]))
    stats = rlk.token_stats(d["x"], d["targets"])
    for again in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert type(again) is rlk.TokenStats and same_bits(again.logprobs, stats.logprobs) and again.is_top1 is None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        arguments = tuple(d[k].tolist() for k in "abc")
        assert pool.apply_async(spawned, (loss, arguments)).get(timeout=120) == loss(d["a"], d["b"], d["c"]).item()


def spawned(loss, columns):
    return loss(*map(torch.tensor, columns)).item()


@pytest.mark.fault(62)
def test_eight_threads_that_call_first_together_agree():
    done = child("""
        import threading
        import torch
        import rlkernels as rlk
        x = torch.randn(64, 1037, generator=torch.Generator().manual_seed(0))
        y = torch.arange(64)
        barrier, found = threading.Barrier(8), [None] * 8

        def call(k):
            leaf = x.clone().requires_grad_()
            barrier.wait()
            for _ in range(5):
                stats = rlk.token_stats(leaf, y)
                gradients = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (y * 0.1, -y * 0.2))
                found[k] = (stats.logprobs.detach(), *gradients)

        threads = [threading.Thread(target=call, args=(k,)) for k in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0]))
        serving = rlk.available_backends()["serves"]["cpu"]["token_stats"]
        assert rlk.ops.calls()["token_stats", serving] == 40, rlk.ops.calls()
        print("done")
        """)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]


@pytest.mark.fault(62)
def test_a_forced_backend_is_that_of_its_thread_alone():
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
        with pytest.raises(KeyError), use_backend("eager"):
            raise KeyError
        assert forced() == "eager"
    assert seen == [None] and forced() is None
