"""The patch in Ray's workers: a setup hook that joins whatever a program hands to ``ray.init``."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rlkernels.integrations._after_import import after_import

HOOK = "worker_process_setup_hook"
SetUp = Callable[[Sequence[str]], object]


def hook_workers(names: Sequence[str], set_up: str) -> None:
    """Makes every later ``ray.init`` of this process call ``set_up(names)`` in each worker that it starts.

    Args:
        names: the hosts to patch.
        set_up: ``"module:function"``, which a worker can import.
    """
    after_import("ray", lambda: _wrap_init(tuple(names), set_up))


def _wrap_init(names: tuple[str, ...], set_up: str) -> None:
    """Replaces ``ray.init`` by a function that adds the hook and calls it."""
    ray: Any = importlib.import_module("ray")
    original = ray.init
    if getattr(original, "of_rlkernels", False):
        return

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("job_config")
        environment = kwargs.get("runtime_env")
        if environment is None and config is not None:
            # Ray lets an environment beside a job's replace it.
            environment = config.runtime_env
        kwargs["runtime_env"] = with_hook(environment, names, set_up)
        return original(*args, **kwargs)

    init.of_rlkernels = True  # type: ignore[attr-defined]
    ray.init = init


def with_hook(environment: Any, names: Sequence[str], set_up: str) -> dict[str, Any]:
    """Returns a runtime environment of Ray with the hook; a hook that it has already runs first.

    Args:
        environment: a dict, a ``RuntimeEnv`` or None. It stays as it is.
        names, set_up: as for ``hook_workers``.

    Raises:
        TypeError: the hook of ``environment`` is neither callable nor a string.
    """
    merged = dict(environment or {})
    before = merged.get(HOOK)
    if before is not None and not callable(before) and not isinstance(before, str):
        raise TypeError(f"ray.init: {HOOK} must be a function or its dotted name, got {type(before).__name__}")
    merged[HOOK] = _hook(tuple(names), set_up, before)
    return merged


def _hook(names: tuple[str, ...], set_up: str, before: Any) -> Callable[[], None]:
    """Returns a function without arguments.

    It is a local one, because cloudpickle sends such a function as code, with what it closes over; and Ray shows its
    name.
    """

    def rlkernels_worker_setup() -> None:
        import importlib

        def resolved(path: str) -> Any:
            module, _, name = path.replace(":", ".").rpartition(".")
            return getattr(importlib.import_module(module), name)

        if before is not None:
            (resolved(before) if isinstance(before, str) else before)()
        resolved(set_up)(names)

    return rlkernels_worker_setup
