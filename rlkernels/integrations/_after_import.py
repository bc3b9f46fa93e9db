"""Calls to be made when a module has been imported, for the modules of others that are too heavy to import ahead."""

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[], object]


class _Watcher(importlib.abc.MetaPathFinder):
    """A finder that finds nothing by itself: it lets the others find a watched module, and acts when that has run."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}
        self.lock = threading.RLock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                _act_after(spec, fullname, self)
                return spec
        return None

    def done(self, fullname: str) -> None:
        with self.lock:
            actions = self.actions.pop(fullname, [])
        for action in actions:
            action()


def _act_after(spec: ModuleSpec, fullname: str, watcher: _Watcher) -> None:
    """Makes the loader of ``spec`` tell the watcher when it has run the module."""
    loader: Any = spec.loader
    if loader is None or not hasattr(loader, "exec_module"):
        return
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        # A loader of a zip file serves several modules.
        if module.__name__ == fullname:
            watcher.done(fullname)

    # On the instance and not around it, because ``inspect`` and ``pkgutil`` ask a module's loader for more.
    loader.exec_module = exec_module


_watcher = _Watcher()


def is_imported(name: str) -> bool:
    """Tells whether the module ``name`` has been imported to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def after_import(name: str, action: Action) -> Callable[[], None]:
    """Calls ``action`` once, as soon as the module ``name`` has been imported; now, if it has been.

    What ``action`` raises goes to whoever imports the module.

    Returns:
        a function that cancels the call.

    Example:
        >>> cancel = after_import("json", lambda: print("json is here"))
        json is here
    """
    if is_imported(name):
        action()
        return lambda: None
    with _watcher.lock:
        _watcher.actions.setdefault(name, []).append(action)
        if _watcher not in sys.meta_path:
            sys.meta_path.insert(0, _watcher)

    def cancel() -> None:
        with _watcher.lock:
            waiting = _watcher.actions.get(name, [])
            if action in waiting:
                waiting.remove(action)
            if not waiting:
                _watcher.actions.pop(name, None)

    return cancel
