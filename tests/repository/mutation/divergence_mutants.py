"""Mistakes in the divergences of two models, on each backend that has them.

A name begins with *divergence*, so that ``--only "cpu divergence"`` tries these alone.
"""

from mutant import Mutant

WITHOUT_WEIGHT = "test_a_row_without_weight_has_no_gradient_whatever_its_divergence"
EAGER = ("test_divergence.py",)
NATIVE = ("test_cpu_divergence.py", f"test_mutant_edges.py::{WITHOUT_WEIGHT}")
INTERPRETED = ("test_interpreted_divergence.py", f"test_interpreted_shared.py::{WITHOUT_WEIGHT}")


def _list(file, tests, *changes):
    return tuple(Mutant(f"divergence: {name}", file, old, new, tests) for name, old, new in changes)


PYTHON = _list(
    "rlkernels/backends/eager_divergence.py",
    EAGER,
    ("the forward KL has the other sign", "else teacher - student", "else student - teacher"),
    (
        "the teacher and the student of a mixture are swapped",
        "torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))",
        "torch.logaddexp(teacher + math.log1p(-beta), student + math.log(beta))",
    ),
    ("the gradient of a JSD lacks its share", "own, (1.0 - beta) * slope", "own, slope"),
    (
        "the reverse KL's gradient forgets the value",
        "p * (student - teacher - distance[..., None])",
        "p * (student - teacher)",
    ),
    ("the support is ignored", "x = torch.where(keep | ~alive, x, -math.inf)", "x = torch.where(keep | True, x, 0.0)"),
    (
        "the tail lacks one of the top outcomes",
        "(1.0 - logprobs.exp().sum(-1, keepdim=True))",
        "(1.0 - logprobs.exp()[..., 1:].sum(-1, keepdim=True))",
    ),
    ("the gradient of the tail is left out", "(-rest).to(real)", "(0.0 * rest).to(real)"),
    (
        "the top outcomes forget the temperature",
        "(chosen - stats.row_max.double()[:, None]) / factor",
        "(chosen - stats.row_max.double()[:, None])",
    ),
    ("an unused entry is an outcome", "[_with_tail(torch.where(known, x, -math.inf), least)", "[_with_tail(x, least)"),
)

CPU = (
    *_list(
        "csrc/cpu/divergence.cpp",
        NATIVE,
        ("beta is swapped", "beta * others + (1 - beta) * of.own", "(1 - beta) * others + beta * of.own"),
        ("the value forgets the temperature", "first.sum_exp / temperature", "first.sum_exp"),
        (
            "the cross entropy lacks the teacher's entropy",
            "  if (kind == Divergence::cross_entropy) of.value += entropy_of(of.q, temperature);\n",
            "",
        ),
        ("the gradient forgets the temperature", "job.scale = weight / temperature * (", "job.scale = weight * ("),
        ("the gradient of a JSD lacks its share", "(kind == Divergence::jsd ? 1 - beta : 1)", "1"),
        ("0 times NaN", "if (dead || weight == 0) return", "if (dead) return"),
    ),
    *_list(
        "csrc/cpu/two_models.h",
        NATIVE,
        (
            "the teacher's columns are read without the mask",
            "job.mask ? stage(ref_support, ref + c, job.mask + c, n) : ref + c;\n    Vec mine",
            "ref + c;\n    Vec mine",
        ),
    ),
)

TRITON = _list(
    "rlkernels/backends/triton/divergence_kernel.py",
    INTERPRETED,
    ("the student's share has the other sign", "return own - lane_sum(p * u)", "return own + lane_sum(p * u)"),
    (
        "beta is swapped",
        "beta * sum_lanes(theirs) + (1.0 - beta) * own",
        "(1.0 - beta) * sum_lanes(theirs) + beta * own",
    ),
    ("the gradient of a JSD lacks its share", "(1.0 - beta) * p * (-u - own)", "p * (-u - own)"),
    ("the gradient forgets the temperature", "scale = inv * LOG2E", "scale = LOG2E"),
    (
        "the cross entropy lacks the teacher's entropy",
        "value += tl.log(ref_sum_exp) - weighted_sum / ref_sum_exp",
        "value += tl.log(ref_sum_exp)",
    ),
    ("the last column is not written", "tl.store(out + v, grad, v < vocab)", "tl.store(out + v, grad, v < vocab - 1)"),
    ("0 times NaN", "if weight == 0.0:", "if weight != weight:"),
)
