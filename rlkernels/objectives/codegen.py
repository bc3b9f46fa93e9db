"""Prints every built-in objective as a C++ functor: ``python -m rlkernels.objectives.codegen > csrc/objectives.h``."""

from rlkernels.objectives.cxx import body, builtin, digest


def header(names=None):
    """The whole header: a functor per objective, the list of them all, and of those that begin with the log-probability
    of a row of logits.

    A pass over logits meets those alone: a switch over all of them costs the CUDA kernel up to 8 registers.
    """
    names = builtin() if names is None else names
    return (
        "// Printed by `python -m rlkernels.objectives.codegen`; a test holds it fresh. Do not edit.\n#pragma "
        'once\n#include "objective_functions.h"\n\n'
        f'#define RLK_OBJECTIVES_DIGEST "{digest(names)}"\n\n{body(names)}'
    )


if __name__ == "__main__":
    print(header(), end="")
