"""A plugin for OpenRLHF's own tests, which load its modules file by file: ours stand there under their names.

``PUBLISHED`` is ``stock``, which changes nothing but the stubs of missing packages, or ``ours``. Each name that a test
calls is counted, so that a run which never reached ours is seen.
"""

import functools
import importlib.machinery
import os
from collections import Counter

# ``compute_entropy`` compiles at import, and a C++ compiler may be missing.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import openrlhf_host

from rlkernels.integrations import openrlhf
from rlkernels.integrations.openrlhf import seams

CALLS = Counter()


def counted(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        CALLS[name] += 1
        return function(*args, **kwargs)

    return call


def as_method(function):
    return lambda self, *args, **kwargs: function(*args, **kwargs)


def put(module):
    """Replaces the names of a module of OpenRLHF that has just been executed, whatever it is called here."""
    path = (getattr(module, "__file__", None) or "").replace("\\", "/")
    for name, (home, _) in seams.FUNCTIONS.items():
        if path.endswith(home.replace(".", "/") + ".py"):
            setattr(module, name, counted(name, getattr(openrlhf, name)))
    if path.endswith(seams.LOSS.replace(".", "/") + ".py"):
        for name in seams.CLASSES:
            ours = getattr(openrlhf, name)
            setattr(module, name, type(name, (ours,), {"forward": counted(name, ours.forward)}))
    if path.endswith(seams.MAKER.replace(".", "/") + ".py"):
        for name in seams.METHODS:
            setattr(module.RemoteExperienceMaker, name, counted(name, as_method(getattr(openrlhf, name))))


_execute = importlib.machinery.SourceFileLoader.exec_module


def exec_module(self, module):
    _execute(self, module)
    put(module)


openrlhf_host.stub_what_is_missing()
if os.environ["PUBLISHED"] == "ours":
    importlib.machinery.SourceFileLoader.exec_module = exec_module


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls of ours: {dict(CALLS)}")
