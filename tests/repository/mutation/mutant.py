"""What a mutant is: one deliberate mistake in one file, and the tests that are asked to notice it."""

import functools
from typing import NamedTuple


class Mutant(NamedTuple):
    """``old`` occurs exactly once in ``file``; ``tests`` are names of files, wherever below ``tests`` they lie, and of
    tests in them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    faults: tuple[int, ...] = ()
    equivalent: str = ""
    """Why no test can tell it from the original; it is then not run."""


FAULTS = {
    1: "drop the tail mask",
    2: "< becomes <= in it",
    3: "drop the 64-bit cast",
    4: "the maximum starts at 0",
    5: "no rescale of the sum",
    6: "no rescale of the entropy's sum",
    7: "no guard for -inf",
    8: "entropy from lse - E[x]",
    9: "p is rounded before 1 - p",
    10: "g is ignored",
    11: "g[0] for all",
    12: "unit stride for g",
    13: "row stride = V",
    14: "the labels' stride is ignored",
    15: "no range check of labels",
    16: "nothing is written for masked rows",
    17: "multiplied by the mask",
    18: "clamp behind exp",
    19: "clip bounds swapped",
    20: "min and max swapped in the surrogate",
    21: "sign of the advantage",
    22: "no KL term",
    23: "no temperature in the backward",
    24: "the temperature twice",
    25: "normaliser over all tokens",
    26: "bf16 accumulator for dW",
    27: "the gradient overwrites the input",
    28: "one barrier less",
    29: "shuffle with half a mask",
    30: "the last warp is left out",
    31: "GAE reads masked values",
    32: "result times 1.01",
}
"""What must have been tried somewhere."""


def problems(root, mutants):
    """What is wrong with a list: a text that no longer occurs exactly once, a test that is not there."""
    found = []
    for m in mutants:
        file = root / m.file
        count = file.read_text().count(m.old) if file.exists() else 0
        if count != 1:
            found.append(
                f"{m.name!r}: its text occurs {count} times in {m.file}, expected once; bring the list up to "
                f"date:\n    {m.old!r}"
            )
        if m.old == m.new:
            found.append(f"{m.name!r} changes nothing")
        for test in m.tests:
            name, _, function = test.partition("::")
            function = function.partition("[")[0]
            # A file may collect tests that another one defines.
            texts = every_test(root) if name in places(root) else {}
            if not any(f"def {function}(" in text for text in texts.values()) if function else not texts:
                found.append(f"{m.name!r} asks {test}, which is not there")
    return found


@functools.cache
def places(root):
    """Every file of tests below ``root``: from its name, of which there is one, to its place."""
    return {path.name: path.relative_to(root).as_posix() for path in sorted((root / "tests").rglob("test_*.py"))}


@functools.cache
def every_test(root):
    return {name: (root / place).read_text() for name, place in places(root).items()}


def located(root, test):
    """``test`` as pytest takes it in the folder ``root``."""
    name, mark, rest = test.partition("::")
    return f"{places(root)[name]}{mark}{rest}"
