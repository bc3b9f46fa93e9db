"""Replacing attributes of somebody else's modules: found by identity, all or nothing, and back to the very objects."""

import inspect
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class Ledger:
    """Counts of how often each seam was served by our kernels, and how often, and why, a call went to the original
    instead.

    ``strict``: an input outside our domain raises; otherwise it is handed to the original and counted.
    """

    def __init__(self) -> None:
        self.strict = True
        self.calls: Counter[str] = Counter()
        self.delegations: Counter[tuple[str, str]] = Counter()

    def clear(self):
        self.calls.clear()
        self.delegations.clear()


class Replacement:
    """Base of what stands in a seam: it knows the object it replaced and whether it may hand a call over to it.

    Args:
        name: the name under which calls and delegations are counted.
        original: the object that is replaced, restored as it is; None where the host had left the attribute empty.
        ledger: where calls and delegations are counted.
    """

    def __init__(self, name: str, original: Any, ledger: Ledger):
        self.name, self.original, self.ledger = name, original, ledger

    def served(self):
        self.ledger.calls[self.name] += 1

    def delegate(self, reason: str):
        """Returns the original for a call outside our domain, or raises under ``strict`` and where there is no
        original.
        """
        if self.ledger.strict or self.original is None:
            cure = (
                "there is no original to hand it to"
                if self.original is None
                else ("patch(strict=False) hands such calls to the original")
            )
            raise RuntimeError(f"{self.name}: {reason}; {cure}")
        self.ledger.delegations[self.name, reason] += 1
        return self.original

    def __repr__(self):
        return f"<rlkernels in place of {self.original!r}>"


class Namespace(Replacement):
    """A module with some of its names replaced; every other name is the module's own, looked up at each use."""

    def __init__(self, name: str, original: Any, ledger: Ledger, **names: Any):
        super().__init__(name, original, ledger)
        vars(self).update(names)

    def __getattr__(self, name: str):
        return getattr(self.original, name)


@dataclass(frozen=True)
class Plan:
    """One seam, checked and ready: ``replacement`` goes to every ``(module, attribute)`` of ``sites``."""

    replacement: Replacement
    sites: tuple[tuple[Any, str], ...]


@dataclass(frozen=True)
class PatchReport:
    """The report of ``patch``, one line per attribute; ``skipped`` holds a line, with the reason, for each seam that
    this host lacks.
    """

    host: str
    replaced: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __str__(self):
        return "\n".join([f"{line} ({self.host})" for line in self.replaced + self.skipped])


@dataclass(frozen=True)
class PatchStatus:
    """Attributes that hold our objects now, and the counts since they were patched: per seam, and per (seam, reason)
    for delegations.
    """

    replaced: tuple[str, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    delegations: dict[tuple[str, str], int] = field(default_factory=dict)


def loaded_modules(package: str) -> list[Any]:
    """Returns the modules of ``package`` imported so far, sorted by name."""
    names = [name for name in sys.modules if name == package or name.startswith(package + ".")]
    return [sys.modules[name] for name in sorted(names) if sys.modules[name] is not None]


def holders(package: str, value: Any) -> tuple[tuple[Any, str], ...]:
    """Returns every ``(module, attribute)`` of the loaded modules of ``package`` whose value *is* ``value``.

    ``vars`` and not ``getattr``: a lazy module would import half of its package to answer.
    """
    return tuple(
        (module, name)
        for module in loaded_modules(package)
        for name, held in list(vars(module).items())
        if held is value
    )


def require_signature(host: str, name: str, function: Any, known: tuple[tuple[str, ...], ...]):
    """Raises RuntimeError unless the parameters of ``function`` equal one of the ``known`` lists."""
    found = tuple(inspect.signature(function).parameters)
    if found not in known:
        raise RuntimeError(f"{host}: {name} takes {found}, known are {list(known)}; nothing was patched")


def describe(site: tuple[Any, str]) -> str:
    return f"{site[0].__name__}.{site[1]}"
