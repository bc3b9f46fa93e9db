"""Other libraries in the GPU benchmark: our calls fit their signatures, and stand-ins with the same signatures get the
right answers.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_bench_gpu import Device

from benchmarks import peers as libraries
from benchmarks.cases import linear_gpu, logits, logits_gpu
from benchmarks.judge import wrong
from benchmarks.peers import PEERS
from benchmarks.problems import linear as linear_problem
from benchmarks.problems import logits as logits_problem
from benchmarks.report import gpu as gpu_report
from benchmarks.timing import gpu as gpu_timing


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
        found = next(n for n in found.body if isinstance(n, ast.FunctionDef) and n.name in ("forward", "apply"))
    arguments = [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
    missing = [p for p in peer.parameters if p not in arguments]
    assert not missing, f"{peer.attribute} takes {arguments}; our call passes {missing}"
    positional = {
        "liger_grpo": 6,
        "verl_linear": 5,
        "fla_grpo": 4,
        "cce": 3,
        "rl_triton": 3,
        "trl_chunked": 9,
        "liger_chunked": 5,
        "liger_sm90": 7,
        "verl_chunked": 4,
    }.get(key, 2)
    plain = [a for a in arguments if a not in ("ctx", "self")][:positional]
    assert plain == list(peer.parameters[:positional]), "passed by position in another order"


def test_a_peer_whose_parameter_was_renamed_is_reported_and_not_called(monkeypatch):
    module = type(sys)("quack.cross_entropy")
    module.cross_entropy = lambda x, labels, reduction="mean": None
    monkeypatch.setitem(sys.modules, "quack", type(sys)("quack"))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    function, line = libraries.load("quack")
    assert function is None and line == (
        "QuACK CE: not measured: cross_entropy takes no target; it takes x, labels, reduction"
    )


def test_an_absent_peer_and_one_that_breaks_at_import_are_one_line_each(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found, lines = libraries.available()
    assert len(lines) == len(PEERS) and "liger_ce" not in found
    assert all("\n" not in line for line in lines)
    assert any(line.startswith("Liger CE: not measured: ModuleNotFoundError") for line in lines)


def test_flash_attentions_file_is_loaded_by_its_path(tmp_path):
    file = tmp_path / "cross_entropy.py"
    file.write_text("def cross_entropy_loss(logits, labels, logit_scale=1.0):\n    return 'losses', 'z'\n")
    function, line = libraries.load("flash", file)
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


def grpo(
    logits,
    old_logp,
    ref_logp,
    completion_ids,
    advantages,
    completion_mask=None,
    temperature=0.9,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.4,
    inplace=True,
    loss_type="dapo",
    reduce=False,
):
    assert (
        temperature == 1.0
        and loss_type == "dapo"
        and reduce
        and all(c.is_contiguous() for c in (logits, old_logp, ref_logp, completion_ids))
    )
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]
    ratio, a = (logp - old_logp).exp(), advantages[:, None]
    kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    terms = -torch.minimum(ratio * a, ratio.clamp(1 - eps_low, 1 + eps_high) * a) + beta * kl
    return (terms * completion_mask).sum() / completion_mask.sum(), []


def logprob_and_entropy(logits, index, temperature=1.0, row_mask=None):
    return logits_problem.stats(logits, index)


def on_policy(logits, ref_logp, input_ids, advantages, beta=0.1, completion_mask=None, save_kl=False, inplace=False):
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    return -advantages[:, None] * (logp - logp.detach()).exp()


STAND_INS = {
    "trl": logprob_and_entropy,
    "liger_grpo": grpo,
    "liger_ce": overwriting,
    "quack": cross_entropy,
    "fla_grpo": on_policy,
    "flash": lambda logits, labels: (cross_entropy(logits, labels), None),
    "fla_ce": lambda logits, target: (cross_entropy(logits, target), None),
    "verl": lambda logits, labels, inplace_backward=True: -cross_entropy(logits, labels),
}


def lineup(peers):
    return libraries.lineup("cpu", peers, False)


@pytest.fixture(scope="module")
def judged():
    problem = logits_gpu.problem_of(torch.device("cpu"), 32, 257, "bf16", 2**12)
    return problem, logits_problem.judge(problem)


@pytest.mark.parametrize("name", (logits.STATS, logits.LOGPROBS, logits.POLICY))
def test_every_peer_of_the_right_formula_is_found_right_on_every_buffer(name, judged):
    problem, judge = judged
    before = [c.clone() for c in problem.copies]
    case = logits_gpu.CASES[name](problem, judge, lineup(STAND_INS))
    gpu_timing.ready(Device(), case.contenders, False)
    peers = {e.name: e for e in case.contenders if not e.ours}
    expected = {
        logits.STATS: {"TRL kernel", "Liger CE", "flash-attn CE", "QuACK CE", "fla CE", "verl", "torch eager"},
        logits.LOGPROBS: {"TRL kernel", "Liger CE", "flash-attn CE", "QuACK CE", "fla CE", "verl", "torch eager"},
        logits.POLICY: {"TRL kernel and torch", "Liger GRPO", "fla GRPO", "torch eager"},
    }[name]
    assert set(peers) == expected
    for e in case.contenders:
        assert not e.failed and "other numbers" not in gpu_report.remark(e), (e.name, e.remark, e.errors)
        if e.name != "fla GRPO":
            assert e.errors, e.name
        for buffer in range(case.buffers):
            again = e.check(e.run(e.prepare(buffer)))
            assert again == e.errors, f"{e.name}: buffer {buffer} gives other errors"
    assert all(torch.equal(a, b) for a, b in zip(problem.copies, before, strict=True)), "a buffer was written"
    assert wrong(case) == []


def test_a_wrong_gradient_of_a_peer_is_remarked(judged):
    problem, judge = judged
    wrong = {"liger_grpo": lambda *a, **k: grpo(*a, **{**k, "beta": 0.5})}
    case = logits_gpu.policy(problem, judge, lineup(wrong))
    gpu_timing.ready(Device(), case.contenders, False)
    assert "other numbers: gradient" in gpu_report.remark(case.named("Liger GRPO"))


def head(hidden, weight, targets):
    return -cross_entropy(hidden.float() @ weight.float().T, targets)


def head_stats(hidden, weight, targets):
    return logits_problem.stats(hidden.float() @ weight.float().T, targets)


def tiled(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
    assert bias is None and softcap is None and (temperature, logit_scale) == (1.0, 1.0)
    logp, entropy = head_stats(hidden, weight, targets)
    return logp, entropy if "entropy" in outputs else None, None, None, None


def scaled(hidden, weight, target, temperature, ignore_index, m_tiles_per_cluster, return_entropy):
    logp, entropy = head_stats(hidden, weight, target)
    return (-logp, entropy) if return_entropy else -logp


class Chunked(torch.nn.Module):
    """As verl's."""

    def __init__(self, chunk_size):
        super().__init__()

    def forward(self, hidden_states, vocab_weights, input_ids, temperature):
        return head_stats(hidden_states, vocab_weights, input_ids)


class Grpo(torch.nn.Module):
    """As Liger's: the loss over sequences, the advantage one per sequence."""

    def __init__(self, beta, compiled, use_ref_model, chunk_size, epsilon_low, epsilon_high, loss_type):
        super().__init__()
        assert beta == 0.0 and not use_ref_model and loss_type == "bnpo"
        self.low, self.high = epsilon_low, epsilon_high

    def forward(
        self, hidden, weight, ids, mask, advantages, bias=None, ref_per_token_logps=None, old_per_token_logps=None
    ):
        logp = head(hidden.flatten(0, 1), weight, ids.flatten()).view(ids.shape)
        ratio, a = (logp - old_per_token_logps).exp(), advantages[:, None]
        return ((-torch.minimum(ratio * a, ratio.clamp(1 - self.low, 1 + self.high) * a) * mask).sum() / mask.sum(), [])


HEADS = {
    "trl_chunked": tiled,
    "liger_sm90": scaled,
    "verl_chunked": Chunked,
    "liger_chunked": Grpo,
    "cce": lambda e, c, t, reduction: -head(e, c, t),
    "verl_linear": lambda h, w, y, temperature, reduction: head_stats(h, w, y),
}


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("linear_policy_loss", set()),
        ("linear_token_stats", {"cut-cross-entropy", "Liger chunked GRPO"}),
        ("linear_token_logprobs", {"Liger chunked GRPO"}),
    ],
)
def test_every_fused_head_of_the_right_formula_is_found_right(name, absent):
    problem = linear_problem.make(torch.device("cpu"), 16, 32, 259, "bf16")
    case = linear_gpu.CASES[name](problem, lineup(HEADS))
    gpu_timing.ready(Device(), case.contenders, False)
    own = [PEERS[key].name for key in HEADS if PEERS[key].name not in absent]
    assert {e.name for e in case.contenders if e.remark != "the floor of this run"} >= {
        *own,
        "torch eager",
        "rlkernels auto",
    }
    assert not absent & {e.name for e in case.contenders}
    for e in case.contenders:
        assert not e.failed and e.errors, (e.name, e.remark)
        if e.name in own:  # they work in fp32: one rounding of the gradient is all that they lose
            assert all(e.errors[q] < 1e-5 for q in ("loss", "logp", "entropy") if q in e.errors), (e.name, e.errors)
            assert all(e.errors[q] <= 1.05 * e.errors[f"{q} rounding"] + 1e-5 for q in ("dhidden", "dweight")), (
                e.name,
                e.errors,
            )
    assert wrong(case) == []
    assert case.flops == 2 * (3 if name == "linear_policy_loss" else 4) * 16 * 32 * 259


def test_at_the_longest_batch_nothing_that_holds_all_logits_runs(monkeypatch):
    problem = linear_problem.make(torch.device("cpu"), 16, 32, 259, "bf16")
    monkeypatch.setattr(linear_gpu, "LONG", 16)
    names = {e.name for e in linear_gpu.policy(problem, lineup(HEADS)).contenders}
    assert (
        "torch eager" not in names
        and "F.linear_cross_entropy" not in names
        and names >= {"rlkernels auto", "TRL chunked"}
    )


def test_a_gradient_of_ours_off_by_two_roundings_is_a_fault():
    problem = linear_problem.make(torch.device("cpu"), 16, 32, 259, "bf16")
    case = linear_gpu.policy(problem, lineup({}))
    gpu_timing.ready(Device(), case.contenders, False)
    mine = next(e for e in case.contenders if e.ours)
    mine.errors["dweight"] = 2 * mine.errors["dweight rounding"]
    assert [f.split(": ")[1].split(" is")[0] for f in wrong(case)] == ["error of dweight"]
