"""The backend that the caller has asked for: a context variable, so that a task of asyncio keeps its
choice to itself.
"""

import contextvars
import threading
from typing import Any

import torch

# The instances of use_backend that are entered. The last one counts.
_choices: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("rlkernels.use_backend", default=())
_traced = threading.local()  # the last one of this thread: Dynamo cannot trace a context variable


def forced() -> str | None:
    """The backend that ``use_backend`` has chosen here, or None."""
    if torch.compiler.is_dynamo_compiling():
        return getattr(_traced, "name", None)
    choices = _choices.get()
    return choices[-1].name if choices else None


def enter(choice: Any) -> None:
    _choices.set((*_choices.get(), choice))
    _traced.name = choice.name


def leave(choice: Any) -> None:
    """Takes away this choice and no other: a generator may end after one that was made while it was suspended."""
    choices = list(_choices.get())
    for k in reversed(range(len(choices))):
        if choices[k] is choice:
            del choices[k]
            break
    _choices.set(tuple(choices))
    _traced.name = choices[-1].name if choices else None


def trace(name: str | None) -> str | None:
    """Sets what Dynamo sees, and returns what it saw."""
    before = getattr(_traced, "name", None)
    _traced.name = name
    return before
