"""A pytest plugin: OpenRLHF's own tests, which load its modules file by file, meet our functions and classes there.

    python -m pytest -p openrlhf_under_ours FOLDER/tests     (with tests/support on PYTHONPATH)

Each name that a test module calls is counted, so that a run which never reached ours is seen.
"""

import functools
import importlib.machinery
from collections import Counter

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


importlib.machinery.SourceFileLoader.exec_module = exec_module


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls of ours: {dict(CALLS)}")
