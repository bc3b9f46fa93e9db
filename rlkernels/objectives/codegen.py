"""Prints every built-in objective as a C++ functor: ``python -m rlkernels.objectives.codegen > csrc/objectives.h``."""

from rlkernels.objectives.cxx import body, builtin, digest


def header(names=None):
    """Returns the whole header: a functor per objective, the list of all objectives, and the list of row objectives.

    A row objective begins with the log-probability of a row of logits. The row kernels switch over that list alone,
    because a switch over all objectives costs the CUDA kernel up to 8 registers.
    """
    names = builtin() if names is None else names
    return (
        "// Printed by `python -m rlkernels.objectives.codegen`; a test holds it fresh. Do not edit.\n#pragma "
        'once\n#include "objective_functions.h"\n\n'
        f'#define RLK_OBJECTIVES_DIGEST "{digest(names)}"\n\n{body(names)}'
    )


if __name__ == "__main__":
    print(header(), end="")
