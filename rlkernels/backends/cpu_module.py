"""The compiled module ``_cpu``, or the reason why there is none."""

import importlib.util
import os

import torch

from rlkernels.backends import built, gate

# find_spec, not try/except ImportError: a module that is absent is a fact, one that is present and broken is an error.
# torch is imported first: its libgomp then serves our parallel loops too, and no second pool of threads competes with
# it.
ABSENT = (
    "rlkernels._cpu was not built: no C++ compiler, or no Python headers, was found at install time; "
    "install g++ (and python3-dev) and run pip install again"
)
if os.environ.get("RLKERNELS_CPU") == "0":
    _cpu, ABSENT = None, "RLKERNELS_CPU=0 is set; unset it before the import"
elif importlib.util.find_spec("rlkernels._cpu") is None:
    _cpu, ABSENT = None, built.why_not("_cpu", ABSENT)
else:
    from rlkernels import _cpu

    # It would take addresses for what they are not, or compute what an objective was.
    if reason := gate.disagreement(_cpu):
        _cpu, ABSENT = None, reason
    else:
        _cpu.know(torch.Tensor, torch.nn.Parameter)
