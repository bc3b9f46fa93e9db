"""Other libraries in the GPU benchmark: our calls fit their signatures, and stand-ins with the same signatures get the right answers."""
import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_bench_gpu import Device

from rlkernels.cli import bench_gpu_cases, bench_gpu_peers, bench_gpu_problem, bench_gpu_report, bench_gpu_small, bench_gpu_timing, bench_problem
from rlkernels.cli.bench_gpu_peers import PEERS


def source_of(module):
    """The file of a module, found without importing anything: a peer's package may need a GPU to be imported."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or []:
        base = Path(folder, *rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return Path(spec.origin) if not rest else None


def definition(module, name):
    """The ``def`` or ``class`` of a name, followed through ``from ... import``."""
    path = source_of(module)
    assert path is not None, f"{module} is not in its package any more"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return definition(node.module if not node.level else f"{module}.{node.module}", name)
    raise AssertionError(f"{module} has no {name}")


@pytest.mark.parametrize("key", PEERS)
def test_our_call_fits_the_installed_peer(key):
    peer = PEERS[key]
    if importlib.util.find_spec(peer.module.split(".")[0]) is None:
        pytest.skip(f"{peer.package} is not installed")
    found = definition(peer.module, peer.attribute)
    if isinstance(found, ast.ClassDef):
        found = next(n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    arguments = [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
    missing = [p for p in peer.parameters if p not in arguments]
    assert not missing, f"{peer.attribute} takes {arguments}; our call passes {missing}"
    positional = {"liger_grpo": 6, "verl_linear": 5, "fla_grpo": 4, "cce": 3, "rl_triton": 3}.get(key, 2)
    plain = [a for a in arguments if a != "ctx"][:positional]
    assert plain == list(peer.parameters[:positional]), "passed by position in another order"


def test_a_peer_whose_parameter_was_renamed_is_reported_and_not_called(monkeypatch):
    module = type(sys)("quack.cross_entropy")
    module.cross_entropy = lambda x, labels, reduction="mean": None
    monkeypatch.setitem(sys.modules, "quack", type(sys)("quack"))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    function, line = bench_gpu_peers.load("quack")
    assert function is None and line == "QuACK CE: not measured: cross_entropy takes no target; it takes x, labels, reduction"


def test_an_absent_peer_and_one_that_breaks_at_import_are_one_line_each(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found, lines = bench_gpu_peers.available()
    assert len(lines) == len(PEERS) and "liger_ce" not in found
    assert all("\n" not in line for line in lines)
    assert any(line.startswith("Liger CE: not measured: ModuleNotFoundError") for line in lines)


def test_flash_attentions_file_is_loaded_by_its_path(tmp_path):
    file = tmp_path / "cross_entropy.py"
    file.write_text("def cross_entropy_loss(logits, labels, logit_scale=1.0):\n    return 'losses', 'z'\n")
    function, line = bench_gpu_peers.load("flash", file)
    assert function(1, 2) == ("losses", "z") and line.startswith("flash-attn CE: flash-attn")


def cross_entropy(x, y, reduction="none"):
    return F.cross_entropy(x.float(), y, reduction=reduction)


def overwriting(input, target, reduction="mean"):
    """As Liger's: the gradient goes over the input in the forward."""
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            log_p = x.float().log_softmax(-1)
            x.data.copy_(log_p.exp().scatter_add(1, y[:, None], -torch.ones(len(y), 1)))
            ctx.save_for_backward(x.detach())
            return -log_p.gather(1, y[:, None])[:, 0]

        @staticmethod
        def backward(ctx, g):
            return ctx.saved_tensors[0].float().mul(g[:, None]).to(ctx.saved_tensors[0].dtype), None

    assert reduction == "none"
    return Function.apply(input, target)


def grpo(logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9, beta=0.04, eps_low=0.2, eps_high=0.4,
         inplace=True, loss_type="dapo", reduce=False):
    assert temperature == 1.0 and loss_type == "dapo" and reduce and all(c.is_contiguous() for c in (logits, old_logp, ref_logp, completion_ids))
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]
    ratio, a = (logp - old_logp).exp(), advantages[:, None]
    kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    terms = -torch.minimum(ratio * a, ratio.clamp(1 - eps_low, 1 + eps_high) * a) + beta * kl
    return (terms * completion_mask).sum() / completion_mask.sum(), []


def logprob_and_entropy(logits, index, temperature=1.0, row_mask=None):
    return bench_problem.stats(logits, index)


def on_policy(logits, ref_logp, input_ids, advantages, beta=0.1, completion_mask=None, save_kl=False, inplace=False):
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    return -advantages[:, None] * (logp - logp.detach()).exp()


STAND_INS = {
    "trl": logprob_and_entropy, "liger_grpo": grpo, "liger_ce": overwriting, "quack": cross_entropy, "fla_grpo": on_policy,
    "flash": lambda logits, labels: (cross_entropy(logits, labels), None), "fla_ce": lambda logits, target: (cross_entropy(logits, target), None),
    "verl": lambda logits, labels, inplace_backward=True: -cross_entropy(logits, labels),
}


@pytest.fixture(scope="module")
def judged():
    problem = bench_gpu_problem.make(torch.device("cpu"), 32, 257, "bf16", 2**12)
    return problem, bench_gpu_problem.Judge(problem)


@pytest.mark.parametrize("name", (bench_gpu_cases.STATS, bench_gpu_cases.LOGP, bench_gpu_cases.POLICY))
def test_every_peer_of_the_right_formula_is_found_right_on_every_buffer(name, judged):
    problem, judge = judged
    before = [c.clone() for c in problem.copies]
    case = bench_gpu_cases.CASES[name](problem, judge, STAND_INS, False)
    bench_gpu_timing.ready(Device(), case.entries, False)
    peers = {e.name: e for e in case.entries if not e.ours}
    expected = {bench_gpu_cases.STATS: {"TRL kernel", "Liger CE", "flash-attn CE", "QuACK CE", "fla CE", "verl", "torch eager"},
                bench_gpu_cases.LOGP: {"TRL kernel", "Liger CE", "flash-attn CE", "QuACK CE", "fla CE", "verl", "torch eager"},
                bench_gpu_cases.POLICY: {"TRL kernel and torch", "Liger GRPO", "fla GRPO", "torch eager"}}[name]
    assert set(peers) == expected
    for e in case.entries:
        assert not e.failed and "other numbers" not in bench_gpu_report.remark(e), (e.name, e.remark, e.errors)
        if e.name != "fla GRPO":
            assert e.errors, e.name
        for buffer in range(case.buffers):
            again = e.check(e.run(e.prepare(buffer)))
            assert again == e.errors, f"{e.name}: buffer {buffer} gives other errors"
    assert all(torch.equal(a, b) for a, b in zip(problem.copies, before, strict=True)), "a buffer was written"
    assert bench_gpu_report.faults(case) == []


def test_a_wrong_gradient_of_a_peer_is_remarked(judged):
    problem, judge = judged
    wrong = {"liger_grpo": lambda *a, **k: grpo(*a, **{**k, "beta": 0.5})}
    case = bench_gpu_cases.policy(problem, judge, wrong, False)
    bench_gpu_timing.ready(Device(), case.entries, False)
    assert "other numbers: gradient" in bench_gpu_report.remark(case.named("Liger GRPO"))


def test_peers_over_hidden_states_are_judged_on_logprobs_and_gradient():
    def head(hidden, weight, labels, *rest):
        return -cross_entropy(hidden.float() @ weight.float().T, labels)

    peers = {"cce": lambda e, c, targets, reduction: -head(e, c, targets), "verl_linear": lambda h, w, y, temperature, reduction: (head(h, w, y), None)}
    case = bench_gpu_small.linear(torch.device("cpu"), peers, False, 16, 32, 259)
    bench_gpu_timing.ready(Device(), case.entries, False)
    for name in ("cut-cross-entropy", "verl linear"):
        assert case.named(name).errors["logp"] < 1e-5 and case.named(name).errors["dhidden"] < 1e-2
    assert bench_gpu_report.faults(case) == []
