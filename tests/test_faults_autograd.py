"""Faults of FAULTS.md 2, 3 and 5 that a CPU can show: gradients and their owners, memory, precision of the fused head, threads, processes, backends."""
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
from reference import assert_within_policy, draw_rows, same_bits, statistics
from torch.profiler import ProfilerActivity, profile

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import BACKENDS, absent, forced, use_backend

PRESENT = [name for name in BACKENDS if absent(name) is None]
ROOT = Path(rlk.__file__).parent.parent
T, V, H = 6, 37, 16


@pytest.fixture(params=PRESENT)
def backend(request):
    with use_backend(request.param):
        yield request.param


def problem(seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    x, targets, _ = draw_rows((T,), V, dtype, seed)
    d = {name: torch.randn(T, generator=draw) for name in ("a", "b", "c", "e")}
    d |= {"hidden": torch.randn(T, H, generator=draw), "weight": torch.randn(V, H, generator=draw), "bias": torch.randn(V, generator=draw)}
    return {**d, "x": x, "targets": targets, "ref": x.flip(-1).contiguous()}


# Name to (the input that is trained, the function from it and the problem to its output).
FUNCTIONS = {
    "token_logprobs": ("x", lambda x, d: rlk.token_logprobs(x, d["targets"], temperature=0.7)),
    "entropy": ("x", lambda x, d: rlk.token_stats(x, d["targets"]).entropy),
    "exact kl": ("x", lambda x, d: rlk.token_stats(x, d["targets"], ref_logits=d["ref"], kl="exact").kl),
    "k3": ("x", lambda x, d: rlk.token_stats(x, d["targets"], ref_logits=d["x"] + 0.1 * d["ref"], kl="k3").kl),
    "logits_policy_loss": ("x", lambda x, d: rlk.logits_policy_loss(
        x, d["targets"], rlk.token_logprobs(d["x"], d["targets"]) + 0.1 * d["b"], d["c"], entropy_coef=0.1)),
    "policy_loss": ("a", lambda a, d: rlk.policy_loss(a, d["a"] + 0.1 * d["b"], d["c"], ref_logprobs=d["e"], kl="k2", kl_coef=0.1)),
    "value_loss": ("a", lambda a, d: rlk.value_loss(a, d["b"], d["c"], clip_range=0.2)),
    "pairwise_reward_loss": ("a", lambda a, d: rlk.pairwise_reward_loss(a, d["b"], center_coef=0.1)),
    "dpo_loss": ("a", lambda a, d: rlk.dpo_loss(a, d["b"], d["c"], d["e"])),
    "linear_token_logprobs": ("weight", lambda w, d: rlk.linear_token_logprobs(d["hidden"], w, d["targets"], bias=d["bias"], chunk_tokens=4)),
    "linear entropy": ("hidden", lambda h, d: rlk.linear_token_stats(h, d["weight"], d["targets"], softcap=5.0).entropy),
    "reward_scores": ("hidden", lambda h, d: rlk.reward_scores(h[None], d["weight"][:1])),
    "aggregate": ("a", lambda a, d: rlk.aggregate(a[None], d["b"][None] > 0)),
}


def output_of(name, d):
    trained, function = FUNCTIONS[name]
    leaf = d[trained].clone().requires_grad_()
    return function(leaf, d), leaf


@pytest.mark.parametrize("name", FUNCTIONS)
def test_F31_the_gradient_is_linear_in_what_comes_from_above(name, backend):
    output, leaf = output_of(name, problem())

    def gradient(g):
        return torch.autograd.grad(output, leaf, g, retain_graph=True)[0]
    g, h = (torch.randn(output.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    gg, hh = gradient(g), gradient(h)
    scale = max(gg.abs().max().item(), hh.abs().max().item())
    assert scale > 1e-3
    torch.testing.assert_close(gradient(2.5 * g - 0.5 * h), 2.5 * gg - 0.5 * hh, rtol=1e-5, atol=3e-6 * scale)
    torch.testing.assert_close(gradient(-2 * g), -2 * gg, rtol=0, atol=1e-37)  # a power of two; a subnormal may round
    assert not gradient(torch.zeros_like(g)).any()
    if output.dim():  # one element at a time adds up
        parts = sum(gradient(torch.zeros_like(g).index_copy(0, torch.tensor([t]), g[t:t + 1])) for t in range(len(g)))
        torch.testing.assert_close(parts, gg, rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_F33_F34_three_backwards_equal_fresh_graphs_also_when_a_gradient_is_edited(name, backend):
    output, leaf = output_of(name, problem())
    for k in range(3):
        # Exactly 1 first: a gradient made in the forward is handed out for it, and must not be handed out twice.
        g = torch.ones_like(output) if k == 0 else torch.randn(output.shape, generator=torch.Generator().manual_seed(k))
        (got,) = torch.autograd.grad(output, leaf, g, retain_graph=True)
        fresh, fresh_leaf = output_of(name, problem())
        assert same_bits(got, torch.autograd.grad(fresh, fresh_leaf, g)[0])
        got.fill_(float("nan"))
    (twice,) = torch.autograd.grad(output, leaf, torch.ones_like(output), retain_graph=True)
    fresh, fresh_leaf = output_of(name, problem())
    assert same_bits(twice, torch.autograd.grad(fresh, fresh_leaf, torch.ones_like(output))[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_F35_editing_an_output_before_the_backward_changes_no_gradient_in_silence(name, backend):
    output, leaf = output_of(name, problem())
    g = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(*output_of(name, problem()), g)[0]
    with torch.no_grad():
        output.zero_()
    try:
        (got,) = torch.autograd.grad(output, leaf, g)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert same_bits(got, expected)


def test_F35_an_edited_metric_or_statistic_changes_no_gradient_in_silence(backend):
    d = problem()
    for editable in ("logsumexp", "entropy", "logprobs", "log_sum_sq_probs"):
        leaf = d["x"].clone().requires_grad_()
        stats = rlk.token_stats(leaf, d["targets"], outputs=("entropy", "log_sum_sq_probs"))
        (expected,) = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (d["a"], d["b"]), retain_graph=True)
        with torch.no_grad():
            getattr(stats, editable).zero_()
        try:
            (got,) = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (d["a"], d["b"]))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), editable
        else:
            assert same_bits(got, expected), editable


@pytest.mark.parametrize("inplace", [False, True])
def test_F32_two_losses_on_the_same_logits(inplace, backend):
    d = problem()
    leaf = d["x"].clone().requires_grad_()
    x = leaf * 1
    first, second = rlk.token_logprobs(x, d["targets"], inplace_backward=inplace), rlk.token_logprobs(x, d["targets"])
    (got,) = torch.autograd.grad(first, leaf, d["a"], retain_graph=True)
    expected = torch.autograd.grad(rlk.token_logprobs(leaf, d["targets"]), leaf, d["a"])[0]
    assert same_bits(got, expected)
    if inplace:  # the logits are gone: later use of them raises
        for later in (first, second):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(later, leaf, d["a"], retain_graph=True)
    else:
        assert same_bits(x.detach(), d["x"]) and same_bits(torch.autograd.grad(second, leaf, d["a"])[0], expected)


@pytest.mark.parametrize("trained", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_F39_what_is_frozen_gets_no_gradient_and_no_buffer(trained, backend):
    d = problem()
    operands = [d[k].clone().requires_grad_(bool(on)) for k, on in zip(("hidden", "weight", "bias"), trained, strict=True)]
    logp = rlk.linear_token_logprobs(operands[0], operands[1], d["targets"], bias=operands[2], chunk_tokens=4)
    assert logp.requires_grad == any(trained)
    if not any(trained):
        return
    logp.backward(d["a"])
    wide = [x.detach().double().requires_grad_() for x in operands]
    truth = torch.autograd.grad(statistics(wide[0] @ wide[1].t() + wide[2], d["targets"])["logprobs"], wide, d["a"].double())
    for x, expected, on in zip(operands, truth, trained, strict=True):
        assert (x.grad is not None) == bool(on)
        if on:
            torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_F40_nothing_is_saved_without_gradients_and_the_bits_are_those_of_training(name, backend):
    d, saved = problem(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        trained, leaf = output_of(name, d)
        assert saved and trained.grad_fn is not None
        saved.clear()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output = FUNCTIONS[name][1](leaf, d)
            assert not saved and not output.requires_grad and same_bits(output, trained.detach())
        FUNCTIONS[name][1](leaf.detach(), d)
        assert not saved


def test_F94_only_what_the_backward_needs_is_saved(backend):
    d = problem()

    def saved_bytes(**options):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            rlk.token_stats(d["x"].clone().requires_grad_(), d["targets"], **options)
        return sum(x.numel() * x.element_size() for x in kept)
    row = T * 4
    assert saved_bytes(outputs=("entropy",)) - saved_bytes(outputs=()) == row
    assert saved_bytes(outputs=(), ref_logits=d["ref"], kl="k3") < d["x"].numel() * 4 * 2  # the reference's logits are not kept for an estimator


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_F43_autocast_takes_any_mix_of_dtypes_and_gradients_come_in_the_parameters_dtype(hidden, weight, bias, backend):
    d = problem()
    operands = [d["hidden"].to(hidden).requires_grad_(), d["weight"].to(weight).requires_grad_(), None if bias is None else d["bias"].to(bias).requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = rlk.linear_token_logprobs(operands[0], operands[1], d["targets"], bias=operands[2])
    assert logp.dtype == torch.float32
    rounded = [None if x is None else x.detach().bfloat16().double() for x in operands]
    logits = rounded[0] @ rounded[1].t() + (0 if bias is None else rounded[2])
    torch.testing.assert_close(logp.detach().double(), statistics(logits, d["targets"])["logprobs"], atol=1e-5, rtol=1e-5)
    logp.backward(d["a"])
    for x in operands:
        assert x is None or x.grad.dtype == x.dtype and x.grad.isfinite().all() and x.grad.any()


def test_F70_every_parameter_of_a_small_model_gets_a_finite_gradient(backend):
    torch.manual_seed(0)
    d = problem()
    body, head = torch.nn.Linear(H, H), torch.nn.Linear(H, V)
    parameters = [*body.parameters(), *head.parameters()]
    stats = rlk.linear_token_stats(body(d["hidden"]), head.weight, d["targets"], bias=head.bias)
    losses = [rlk.policy_loss(stats.logprobs, stats.logprobs.detach(), d["c"], d["targets"] != -100, entropy=stats.entropy, entropy_coef=0.1),
              rlk.logits_policy_loss(head(body(d["hidden"])), d["targets"], stats.logprobs.detach(), d["c"], entropy_coef=0.1)]
    gradients = []
    for loss in losses:
        assert loss.grad_fn is not None
        gradients.append(torch.autograd.grad(loss, parameters))
        assert all(g.isfinite().all() and g.any() for g in gradients[-1])
    for linear, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(linear, dense, rtol=1e-4, atol=1e-6)


def head_problem(rows, hidden, vocab, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(rows, hidden, generator=draw).to(dtype), (torch.randn(vocab, hidden, generator=draw) * 3 / hidden**0.5).to(dtype))
    return h, w, torch.randint(vocab, (rows,), generator=draw), torch.randn(rows, generator=draw)


def test_F67_the_fused_head_keeps_the_accumulator_of_its_logits(backend):
    h, w, targets, _ = head_problem(3, 1024, 32_000, torch.bfloat16)
    kept, rounded = (rlk.linear_token_logprobs(h, w, targets, logits_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    logits = h.double() @ w.double().t()
    truth = statistics(logits, targets)["logprobs"]
    assert_within_policy(kept, truth, statistics(h.float() @ w.float().t(), targets, dtype=torch.float32)["logprobs"], "logprobs")
    assert (kept - truth).abs().max() <= 4e-6
    assert (rounded - truth).abs().max() > 1e-3  # rounding, where it is asked for, is that of the logits
    assert (rounded - statistics(logits.bfloat16(), targets)["logprobs"]).abs().max() < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_F21_F76_gradients_of_the_head_do_not_depend_on_the_number_of_chunks(dtype, backend):
    h, w, targets, g = head_problem(48, 32, 133, dtype)
    wide = [x.double().requires_grad_() for x in (h, w)]
    truth = torch.autograd.grad(statistics(wide[0] @ wide[1].t(), targets)["logprobs"], wide, g.double())
    best = [(t.to(dtype).double() - t).norm() / t.norm() for t in truth]  # one cast of the truth
    errors = []
    for chunk in (1, 7, 48, None):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        rlk.linear_token_logprobs(*leaves, targets, chunk_tokens=chunk).backward(g)
        errors.append([((x.grad.double() - t).norm() / t.norm()).item() for x, t in zip(leaves, truth, strict=True)])
    for error in errors:
        for got, once in zip(error, best, strict=True):
            assert got <= 1.05 * once, f"{errors}, one cast costs {best}"
    weights = [e[1] for e in errors]
    assert max(weights) <= 1.02 * min(weights)


def peak_bytes(run):
    """The most memory above the start that torch's allocator handed out while ``run`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        result = run()
    now = peak = 0
    for event in sorted((e for e in events.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak


@pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_F92_no_second_tensor_of_the_logits_size_exists(dtype):
    x, targets, _ = draw_rows((64,), 8192, dtype)
    size = x.numel() * x.element_size()
    t, old = torch.full((64,), 0.7), torch.zeros(64)
    leaf = x.requires_grad_()

    def stats():
        s = rlk.token_stats(leaf, targets, temperature=t)
        return torch.autograd.grad((s.logprobs, s.entropy), leaf, (old + 0.3, old - 1))

    def policy(g=1.0, **options):
        return torch.autograd.grad(rlk.logits_policy_loss(leaf, targets, old, old, temperature=t, entropy_coef=0.1, **options), leaf, torch.tensor(g))

    with use_backend("cpu"):
        with torch.no_grad():
            assert peak_bytes(lambda: rlk.token_stats(x, targets, temperature=t)) < 0.05 * size
        assert size <= peak_bytes(stats) < 1.05 * size
        assert size <= peak_bytes(policy) < 1.05 * size
        made = leaf * 1
        assert peak_bytes(lambda: torch.autograd.grad(rlk.token_logprobs(made, targets, inplace_backward=True).sum(), made)) < 0.05 * size
        made = leaf * 1
        loss = rlk.logits_policy_loss(made, targets, old, old, entropy_coef=0.1, inplace_backward=True)
        assert peak_bytes(lambda: torch.autograd.grad(loss, made)) < 0.05 * size


@pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")
def test_F92_F95_the_fused_head_holds_one_chunk_of_logits():
    h, w, targets, g = head_problem(256, 32, 4096, torch.float32)
    leaves = [h.requires_grad_(), w.requires_grad_()]

    def run(chunk):
        return torch.autograd.grad(rlk.linear_token_logprobs(*leaves, targets, chunk_tokens=chunk), leaves, g)
    dense, weight = 256 * 4096 * 4, w.numel() * 4
    with use_backend("cpu"):
        peaks = {chunk: peak_bytes(lambda chunk=chunk: run(chunk)) for chunk in (8, 64, 256)}
    for chunk, peak in peaks.items():
        assert peak <= dense * chunk / 256 * 1.1 + 3 * weight, f"{peaks}, dense logits take {dense}"
    assert peaks[8] < 0.5 * dense + 2 * weight < peaks[256] + dense


def test_F46_a_forced_backend_refuses_a_device_it_does_not_serve_and_automatic_choice_takes_one_that_does():
    x, targets, _ = draw_rows((3,), V)
    if absent("cpu") is None:
        with use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' does not serve device meta .*token_stats"):
            rlk.token_logprobs(x.to("meta"), targets.to("meta"))
    before = ops.calls()
    rlk.token_logprobs(x, targets)
    assert ops.calls() - before == {("token_stats", PRESENT[-1]): 1}
    assert rlk.backends()["serves"]["cpu"]["token_stats"] == PRESENT[-1]


def test_F91_the_backend_of_the_forward_runs_the_backward_and_both_are_counted(backend):
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


def test_F54_an_empty_shard_of_the_head_is_refused_with_what_to_do():
    d = problem()
    for empty in (torch.empty(0), torch.empty(0, H), torch.empty(V, 0)):
        with pytest.raises(ValueError, match=r"weight has 0 elements; gather it first \(ZeRO-3"):
            rlk.linear_token_logprobs(d["hidden"], empty, d["targets"])


def child(code, *arguments, root=ROOT, **environment):
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], env={**os.environ, "PYTHONPATH": path, **environment}, cwd="/",
                          capture_output=True, text=True, timeout=120)


def test_F58_the_library_imports_and_runs_without_triton_without_a_compiler_and_without_its_native_module(tmp_path):
    shutil.copytree(ROOT / "rlkernels", tmp_path / "rlkernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", ".ruff_cache"))
    done = child("""
        import sys
        sys.modules["triton"] = None
        # An editable install would find the compiled module in the source tree.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
        import torch
        import rlkernels as rlk
        found = rlk.backends()
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
        """, root=tmp_path, PATH="")
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]


def test_F61_functions_and_results_survive_copying_pickling_and_a_spawned_process():
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


def test_F62_eight_threads_that_call_first_together_agree():
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
                found[k] = (stats.logprobs.detach(), *torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (y * 0.1, -y * 0.2)))

        threads = [threading.Thread(target=call, args=(k,)) for k in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0]))
        assert rlk.ops.calls()["token_stats", rlk.backends()["serves"]["cpu"]["token_stats"]] == 40, rlk.ops.calls()
        print("done")
        """)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]


def test_F62_a_forced_backend_is_that_of_its_thread_alone():
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
        with pytest.raises(KeyError), use_backend("eager"):
            raise KeyError
        assert forced() == "eager"
    assert seen == [None] and forced() is None


def test_F84_F31_a_loss_scaled_from_above_has_one_rounding(backend):
    # fp16: a gradient made in the forward for g = 1 would have underflowed before the loss scale arrives.
    x, targets, _ = draw_rows((4,), V, torch.float16)
    leaf = x.requires_grad_()
    loss = rlk.logits_policy_loss(leaf, targets, torch.zeros(4), torch.full((4,), 1e-7), objective="reinforce")
    (got,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0**16))
    wide = x.detach().double().requires_grad_()
    live = targets != -100
    (want,) = torch.autograd.grad(-(1e-7 * 2.0**16) * statistics(wide, targets)["logprobs"][live].mean(), wide)
    assert want.abs().max() < 6e-3 and got.any()
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=6e-8)
