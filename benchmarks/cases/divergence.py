"""The cases of distillation over logits: a divergence from a teacher, forward and backward."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks.cases.case import Case, differentiated
from benchmarks.cases.logits import Make, case
from benchmarks.judge import Judge
from benchmarks.lineup import Lineup
from benchmarks.problems.logits import PIECE, Problem, log_softmax
from benchmarks.timing.contender import Contender

NAMES = {kind: f"divergence_loss ({kind}) forward+backward" for kind in ("forward_kl", "jsd")}


def composed(kind: str, logits: Tensor, teacher: Tensor) -> Tensor:
    """The mean divergence as trainers write it; the JSD is that of beta 1/2."""
    log_p, log_q = log_softmax(logits), log_softmax(teacher)
    if kind == "forward_kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
    mixture = torch.logsumexp(torch.stack([log_p, log_q]), 0) - 0.6931471805599453
    halves = (F.kl_div(mixture, x, reduction="none", log_target=True).sum(-1) for x in (log_p, log_q))
    return 0.5 * sum(halves).mean()


def _judge(kind: str, problem: Problem, teacher: Tensor) -> Judge:
    """The judge by torch in float64: of the loss over all rows, and of the gradient of the checked rows."""
    tokens, rows = problem.targets.numel(), problem.rows
    x = problem.logits[rows].double().requires_grad_()
    total = composed(kind, x, teacher[rows].double()) * len(rows) / tokens
    (gradient,) = torch.autograd.grad(total, x)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for piece, other in zip(problem.logits.split(PIECE), teacher.split(PIECE), strict=True):
        loss += composed(kind, piece.double(), other.double()) * len(piece) / tokens
    return Judge({"loss": loss}, {"ddivergence": (rows, gradient)}, rows)


def _case(kind: str, problem: Problem, _: Judge, lineup: Lineup) -> Case:
    # Another row's logits, in another memory.
    teacher = problem.ref_copies[0] if problem.ref_copies else problem.logits.roll(1, 0)
    judge = _judge(kind, problem, teacher)
    check = judge.check("loss", gradients=("ddivergence",))

    def make(name: str, function: object, **options: object) -> Contender:
        run = differentiated(lambda leaf: function(leaf, teacher))
        return Contender(name, run, **{"prepare": problem.leaves, "check": check, **options})

    everyone = lineup.contenders(
        make, functools.partial(rlkernels.divergence_loss, kind=kind), functools.partial(composed, kind)
    )
    return case(NAMES[kind], problem, judge, everyone, "2R+1W", 2, 1)


CASES: dict[str, Make] = {name: functools.partial(_case, kind) for kind, name in NAMES.items()}
