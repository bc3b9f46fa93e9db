"""The attributes of somebody else's modules, replaced and restored: by identity, all or nothing, to the very objects.

A module for a host library lists its seams, and ``Host`` does the rest::

    _host = register(Host("trl", "trl", title="TRL", series=("1.15", "1.16"), install='pip install "trl>=1.15"'))

    def _plan_head() -> Plan | str:  # a seam that this version lacks returns the reason
        utils = importlib.import_module("trl.trainer.utils")
        site = Site.of(utils, "selective_log_softmax")
        original = _host.require_own(site, "trl.trainer.utils")
        _host.require_signature(site.label, original, (("logits", "index"),))
        return Plan(original, _host.counted("selective_log_softmax", original, ours, outside), (site,))

    def patch(strict: bool = True) -> PatchReport:
        return _host.patch({"logits": _plan_head}, strict)

    unpatch, status = _host.unpatch, _host.status
"""

import functools
import importlib
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

from rlkernels import checks

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "nothing"})()
"""The content of a site that does not exist: an attribute not set, a key that a registry lacks."""


@dataclass(frozen=True, eq=False)
class Site:
    """A place that holds an object: an attribute of a module or of a class, or a key of a dict.

    ``owner`` is the module, class or dict, ``key`` the attribute or key, ``label`` the name in reports.
    """

    owner: Any
    key: Any
    label: str

    @classmethod
    def of(cls, owner: Any, key: Any, label: str | None = None) -> "Site":
        """Returns the site; a dict has no name of its own and needs ``label``."""
        if label is None:
            home = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
            label = f"{home}.{key}"
        return cls(owner, key, label)

    @property
    def identity(self) -> tuple[int, Any]:
        return id(self.owner), self.key

    def read(self) -> Any:
        """Returns what the owner itself holds, or ``ABSENT``.

        ``vars`` and not ``getattr``: a lazy module would import half of its package to answer, and a class would answer
        with what its base holds.
        """
        return (self.owner if isinstance(self.owner, dict) else vars(self.owner)).get(self.key, ABSENT)

    def write(self, value: Any) -> None:
        """Puts ``value`` here; ``ABSENT`` removes the key."""
        if isinstance(self.owner, dict):
            if value is ABSENT:
                self.owner.pop(self.key, None)
            else:
                self.owner[self.key] = value
        elif value is not ABSENT:
            setattr(self.owner, self.key, value)
        elif self.key in vars(self.owner):
            delattr(self.owner, self.key)


@dataclass(frozen=True)
class Plan:
    """One object to be replaced, checked and ready.

    Attributes:
        original: the object that stands at the sites; ``ABSENT`` for a new name, None where the host left it empty.
        replacement: ours.
        sites: where it goes.
        everywhere: also to every module of the host that holds ``original`` under any name (``from a import f``).
    """

    original: Any
    replacement: Any
    sites: tuple[Site, ...]
    everywhere: bool = True


@dataclass(frozen=True)
class PatchReport:
    """The report of ``patch``, one line per attribute; ``skipped`` holds a line, with the reason, for each seam that
    this host lacks.
    """

    host: str
    replaced: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{line} ({self.host})" for line in self.replaced + self.skipped])


@dataclass(frozen=True)
class PatchStatus:
    """Attributes that hold our objects now, and the counts since they were patched: per seam, and per (seam, reason)
    for delegations. A call inside a compiled program is not counted, because counting would break its graph.
    """

    replaced: tuple[str, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    delegations: dict[tuple[str, str], int] = field(default_factory=dict)
    host: str = ""


def loaded_modules(*packages: str) -> list[ModuleType]:
    """Returns the modules of the ``packages`` imported so far, sorted by name."""
    names = [name for name in sys.modules if any(name == p or name.startswith(p + ".") for p in packages)]
    return [sys.modules[name] for name in sorted(names) if sys.modules[name] is not None]


def holders(packages: Sequence[str], value: Any) -> list[Site]:
    """Returns every attribute of the loaded modules of ``packages`` whose value *is* ``value``."""
    return [
        Site.of(module, name)
        for module in loaded_modules(*packages)
        for name, held in list(vars(module).items())
        if held is value
    ]


def home_of(value: Any) -> str | None:
    """Returns the name of the module whose source defined ``value``.

    The globals of a function and not its ``__module__``, because ``functools.wraps`` copies the latter to a wrapper.
    """
    if isinstance(value, ModuleType):
        return value.__name__
    scope = getattr(value, "__globals__", None)
    return getattr(value, "__module__", None) if scope is None else scope.get("__name__")


@dataclass
class _Active:
    """A seam that is patched: its plans, and each site with the replacement there and what it held before."""

    plans: tuple[Plan, ...]
    held: list[tuple[Site, Any, Any]] = field(default_factory=list)


class Host:
    """One host library: its patch, the way back, and the counts of calls.

    ``patch`` and ``unpatch`` hold a lock. Options of a patch (``options``) and ``strict`` are read by replacements at
    each call, so a second ``patch`` changes them in place.

    Args:
        name: the key in ``rlkernels.status()``.
        title: the name in messages, with the version behind it.
        packages: the packages whose modules are searched for an object by identity; the first one is imported.
        series: the versions known, as ``"1.16"`` or ``"0.11.2"``, ascending; empty for a host without versions.
        install: the command that installs it, for the ImportError.
    """

    def __init__(self, name: str, *packages: str, title: str, series: Sequence[str] = (), install: str = ""):
        self.name, self.packages, self.series, self.install = name, packages, tuple(series), install
        self._name, self.title = title, title
        self.strict = True
        self.options: dict[str, Any] = {}
        self.calls: Counter[str] = Counter()
        self.delegations: Counter[tuple[str, str]] = Counter()
        self.lock = threading.RLock()
        self._counting = threading.Lock()
        self._active: dict[str, _Active] = {}

    # What a planner asks -------------------------------------------------------------------------------------------

    def version(self) -> str:
        """Returns the version of the installed host, or ``""`` where it has none.

        Raises:
            ImportError: it is not installed; the message says what to install.
        """
        try:
            module = importlib.import_module(self.packages[0])
        except ImportError as error:
            needs = f"rlkernels.integrations.{self.name} needs {self._name} ({error})"
            raise ImportError(f"{needs}; {self.install}" if self.install else needs) from error
        version = getattr(module, "__version__", None)
        if version is None:
            try:
                version = metadata.version(self.packages[0])
            except metadata.PackageNotFoundError:
                version = ""
        return str(version)

    def require_version(self, strict: bool) -> str:
        """Imports the host and returns its version.

        Raises:
            RuntimeError: the version is older than the first of ``series``, or none of them under ``strict``.
        """
        version = self.version()
        self.title = f"{self._name} {version}".strip()
        if self.series and not any(version == s or version.startswith(s + ".") for s in self.series):
            newer = _numbers(version) > _numbers(self.series[-1])
            if strict or _numbers(version) < _numbers(self.series[0]):
                cure = "; patch(strict=False) accepts a newer one whose signatures are known" if newer else ""
                known = ", ".join(s if s.count(".") > 1 else f"{s}.x" for s in self.series)
                raise self.refusal(f"known are {known}", cure)
        return version

    def refusal(self, message: str, cure: str = "") -> RuntimeError:
        """Returns the error of a patch that changes nothing."""
        return RuntimeError(f"{self.title}: {message}; nothing was patched{cure}")

    def require_signature(self, name: str, function: Any, known: Sequence[Sequence[str]]) -> tuple[str, ...]:
        """Returns the parameters of ``function``.

        Raises:
            RuntimeError: they equal none of the ``known`` lists.
        """
        found = tuple(inspect.signature(function).parameters)
        if found not in map(tuple, known):
            raise self.refusal(f"{name} takes {found}, known are {[tuple(k) for k in known]}")
        return found

    def require_own(self, site: Site, *homes: str, what: str = "the host's own") -> Any:
        """Returns the object at ``site``.

        Raises:
            RuntimeError: it does not exist, or none of the modules ``homes`` defined it.
        """
        found = site.read()
        if found is ABSENT:
            raise self.refusal(f"{site.label} does not exist")
        if home_of(found) not in homes:
            raise RuntimeError(
                f"{self.title}: {site.label} is {found!r} and not {what}: another library has patched it; "
                "undo that patch first, nothing was patched"
            )
        return found

    # The patch -----------------------------------------------------------------------------------------------------

    def patch(
        self,
        planners: Mapping[str, Callable[[], Plan | Sequence[Plan] | str]],
        strict: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> PatchReport:
        """Replaces the objects of the seams ``planners``, all or none; a seam patched before stays as it is.

        Args:
            planners: a function per seam that checks it and returns its plans, or the reason why this host lacks it.
            strict: a call outside our domain raises, and a version newer than ``series`` is refused.
            options: for the replacements, which read ``host.options``.

        Returns:
            One line per attribute that holds ours, and one per seam that this host lacks.

        Raises:
            ImportError: the host is not installed.
            RuntimeError: version or signature unknown, or another library has replaced an object. Nothing is replaced.
            TypeError: ``strict`` is no bool.
        """
        strict = checks.flag(f"{self.name}.patch", "strict", strict)
        with self.lock:
            self.require_version(strict)
            seams: dict[str, _Active] = {}
            skipped: list[str] = []
            for name, planner in planners.items():
                active = self._active.get(name)
                if active is None:
                    planned = planner()
                    if isinstance(planned, str):
                        skipped.append(planned)
                        continue
                    active = _Active((planned,) if isinstance(planned, Plan) else tuple(planned))
                else:
                    self._require_ours(active)
                seams[name] = active
            # Every check has passed, so a refusal never leaves half of the seams replaced.
            written: list[tuple[_Active, Site, Any, Any]] = []
            try:
                for active in seams.values():
                    known = {site.identity for site, _, _ in active.held}
                    for plan in active.plans:
                        for site in self._sites(plan):
                            if site.identity not in known:
                                known.add(site.identity)
                                written.append((active, site, plan.replacement, site.read()))
                                site.write(plan.replacement)
            except BaseException:
                for _, site, _, before in reversed(written):
                    site.write(before)
                raise
            if not self._active:
                self.calls.clear()
                self.delegations.clear()
            for active, site, replacement, before in written:
                active.held.append((site, replacement, before))
            self._active.update(seams)
            self.strict, self.options = strict, dict(options or {})
            lines = [f"{s.label} -> rlkernels ({name})" for name, active in seams.items() for s, _, _ in active.held]
            return PatchReport(self.title, tuple(lines), tuple(skipped))

    def unpatch(self) -> None:
        """Restores every attribute to the object that ``patch`` found there. Without a patch it does nothing.

        Raises:
            RuntimeError: another library has since replaced an attribute; undo its patch first. Nothing is restored.
        """
        with self.lock:
            for active in self._active.values():
                self._require_ours(active)
            for active in self._active.values():
                for site, _, before in active.held:
                    site.write(before)
                # Found again by identity, because a module imported meanwhile has bound our object under its own name.
                for plan in active.plans:
                    for site in holders(self.packages, plan.replacement):
                        site.write(plan.original)
            self._active.clear()

    def status(self) -> PatchStatus:
        """Returns the attributes that are replaced now, and the calls and delegations counted since; the counts
        outlive ``unpatch`` until the next ``patch``.
        """
        with self.lock:
            held = [site.label for a in self._active.values() for site, ours, _ in a.held if site.read() is ours]
            return PatchStatus(tuple(held), dict(self.calls), dict(self.delegations), self.title)

    def _sites(self, plan: Plan) -> list[Site]:
        found = list(plan.sites)
        if plan.everywhere and plan.original is not ABSENT and plan.original is not None:
            found += holders(self.packages, plan.original)
        return found

    def _require_ours(self, active: _Active) -> None:
        for site, ours, _ in active.held:
            found = site.read()
            if found is not ours:
                message = f"{site.label} was replaced by {found!r} after our patch"
                raise RuntimeError(f"{self.title}: {message}; undo that one first, nothing was changed")

    # What a replacement calls --------------------------------------------------------------------------------------

    def served(self, name: str) -> None:
        """Counts a call of the seam ``name`` that our kernels served."""
        if not torch.compiler.is_compiling():
            with self._counting:
                self.calls[name] += 1

    def delegate(self, name: str, original: Any, reason: str, by_contract: bool = False) -> Any:
        """Returns ``original`` for a call outside our domain, and counts it with its reason.

        ``by_contract``: the host's tests demand the original's own bits here, so ``strict`` does not refuse it.

        Raises:
            RuntimeError: under ``strict``, or where there is no original.
        """
        missing = original is None or original is ABSENT
        if missing or (self.strict and not by_contract):
            cure = (
                "there is no original to hand it to"
                if missing
                else "patch(strict=False) hands such calls to the original"
            )
            raise RuntimeError(f"{name}: {reason}; {cure}")
        if not torch.compiler.is_compiling():
            with self._counting:
                self.delegations[name, reason] += 1
        return original

    def counted(
        self,
        name: str,
        original: Callable[..., Any],
        ours: Callable[..., Any],
        outside: Callable[..., str | None] | None = None,
        by_contract: Callable[..., str | None] | None = None,
    ) -> Callable[..., Any]:
        """Returns a function with the name and signature of ``original`` that calls ``ours`` and counts.

        It is a function and not an object, so that it binds as a method and is pickled under the original's name.

        Args:
            outside: called with the same arguments; the reason why a call is not ours, or None.
            by_contract: the same for calls that belong to the original by contract, under ``strict`` too.
        """

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            reason = by_contract(*args, **kwargs) if by_contract is not None else None
            if reason is not None:
                return self.delegate(name, original, reason, by_contract=True)(*args, **kwargs)
            reason = outside(*args, **kwargs) if outside is not None else None
            if reason is not None:
                return self.delegate(name, original, reason)(*args, **kwargs)
            result = ours(*args, **kwargs)
            self.served(name)
            return result

        return call


class Replacement:
    """A base for objects that stand in a seam: each knows what it replaced and may hand a call over to it.

    Args:
        name: the name under which calls and delegations are counted.
        original: the object that is replaced, restored as it is; None where the host had left the attribute empty.
        host: where calls and delegations are counted.
    """

    def __init__(self, name: str, original: Any, host: Host):
        self.name, self.original, self.host = name, original, host

    def served(self) -> None:
        self.host.served(self.name)

    def delegate(self, reason: str, by_contract: bool = False) -> Any:
        """Returns the original for a call outside our domain: see ``Host.delegate``."""
        return self.host.delegate(self.name, self.original, reason, by_contract)

    def __repr__(self) -> str:
        return f"<rlkernels in place of {self.original!r}>"


class Namespace(Replacement):
    """A module with some of its names replaced; every other name is the module's own, looked up at each use."""

    def __init__(self, name: str, original: Any, host: Host, **names: Any):
        super().__init__(name, original, host)
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


_registered: dict[str, Host] = {}


def register(host: Host) -> Host:
    """Enters ``host`` for ``rlkernels.status()`` and returns it."""
    _registered[host.name] = host
    return host


def status() -> dict[str, PatchStatus]:
    """Returns, for every host whose module was imported, what is patched and how often our kernels were called.

    Cheap: it imports no trainer. A call that went to the host's own function stands under ``delegations`` with its
    reason. No entry means that the module of that host was never imported, so nothing of it is patched.

    Returns:
        a ``PatchStatus`` per host name: ``replaced``, ``calls`` per seam, ``delegations`` per (seam, reason).

    Example:
        >>> import rlkernels
        >>> from rlkernels.integrations import trl
        >>> rlkernels.status()["trl"].replaced
        ()
    """
    return {name: _registered[name].status() for name in sorted(_registered)}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))
