"""The choice of a backend: which one serves which op here, and why one is absent."""

import contextlib
import importlib
import importlib.util
import os
import warnings
from typing import Any, get_args

import torch

from rlkernels.backends import context, cpu, cuda, eager
from rlkernels.backends.context import forced as forced
from rlkernels.backends.expected_order import expected
from rlkernels.backends.measured_order import preferred
from rlkernels.installing import how
from rlkernels.types import Availability, Backend

OPS = ("token_stats", "token_stats_backward", "fused_policy", "divergence", "elementwise", "weighted_loss", "gae")
KNOWN = get_args(Backend)
DEVICES = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager"), "xpu": ("triton", "eager"), "meta": ("eager",)}
"""Device type to the backends that can serve it, first choice first. ``measured_order.TABLE`` overrides the order where
something was measured, and ``expected_order`` where a model expects another one.
"""


class _Modules(dict[str, Any]):
    """Name to module. Triton's is imported when it first serves: ``import rlkernels`` must not load Triton."""

    def __missing__(self, name: str) -> Any:
        self[name] = importlib.import_module(f"rlkernels.backends.{name}")
        return self[name]


BACKENDS = _Modules(eager=eager, cpu=cpu, cuda=cuda)
_said = False  # that CPU tensors are served without native code
# Accelerator backends that have been found: looking for Triton and a GPU again costs 30 us per call.
_present: set[str] = set()


def interpreted() -> bool:
    """Tells whether Triton runs kernels on CPU tensors (``TRITON_INTERPRET=1``), which is how they are proven without a
    GPU.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def absent(name: str) -> str | None:
    """Why backend ``name`` cannot be used here, or None where it can."""
    if name == "triton":
        found = importlib.util.find_spec("triton")
        if found is None or found.origin is None:  # a folder of that name on the path is found too, as a namespace
            return f"Triton is not installed; {how('triton')}"
        if not (torch.cuda.is_available() or torch.xpu.is_available() or interpreted()):
            return "torch sees no GPU here, and TRITON_INTERPRET=1 is not set"
        return None
    if name == "eager":
        return None
    present, reason = BACKENDS[name].available()
    return None if present else reason


def _say_once(reason: str | None) -> None:
    """Warns in the first native-less call of a process: it is right, and slow without a word.

    Not where native code was switched off.
    """
    global _said
    if torch.compiler.is_compiling() or _said:
        return
    _said = True
    if reason is not None and "RLKERNELS_CPU=0" not in reason:
        warnings.warn(
            f"{reason}. CPU tensors take the eager backend meanwhile: the same results, slower. "
            "RLKERNELS_CPU=0 says that this is meant, "
            "and stops this warning",
            RuntimeWarning,
            stacklevel=5,
        )


def serving(
    op: str,
    device: str,
    dtype: torch.dtype | None = None,
    vocab: int | None = None,
    *,
    index: int | None = None,
    models: int = 1,
    objective: str | None = None,
    aloud: bool = True,
) -> str:
    """The backend that serves ``op`` on a device type, by the table of measurements where it has an entry for dtype and
    vocabulary, else by what a model expects.

    ``index``: which of the devices. ``models``, ``objective``: what is computed, as far as the expectation depends on
    it. ``aloud``: the choice is for a call, not for a report, so a process that has no native code for its CPU tensors
    says so once.

    Raises:
        RuntimeError: no backend serves the device, or the forced one does not.
    """
    choices = DEVICES.get(device)
    if choices is None:
        raise RuntimeError(f"no backend for device {device}; available: {', '.join(sorted(DEVICES))}")
    name = forced()
    if name is not None:
        if name != "eager" and name not in choices and not (name == "triton" and device == "cpu" and interpreted()):
            raise RuntimeError(
                f"backend {name!r} does not serve device {device} (asked for {op}); move the tensors or "
                "leave use_backend"
            )
        return name
    if device == "cpu":
        if cpu._cpu is not None:
            return "cpu"
        if aloud:
            _say_once(absent("cpu"))
        return "eager"
    if len(choices) > 2:
        choices = preferred(op, device, dtype, vocab, expected(op, dtype, choices, index, models, objective))
    for name in choices:
        if name in _present:
            return name
        if absent(name) is None:
            if name != "eager":
                _present.add(name)
            return name
    raise RuntimeError(f"no backend for device {device} is present here: {', '.join(choices)}")


class use_backend(contextlib.ContextDecorator):
    """The context in which every op runs on backend ``name``: ``"eager"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    An op, dtype or device that the backend lacks raises; nothing falls back in silence. The choice belongs to the
    context of ``contextvars``: a task of asyncio has its own, a new thread starts without one, and a generator that
    yields inside shares it with whoever asks for the next value. Under ``torch.compile`` it is that of the thread. A
    backward runs on the backend of its forward, wherever it is called.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend is absent here; the message says why.

    Example:
        >>> import rlkernels
        >>> with use_backend("eager"):
        ...     rlkernels.token_logprobs(torch.zeros(1, 4), torch.tensor([2]))
        tensor([-1.3863])
    """

    def __init__(self, name: Backend) -> None:
        self.name = name

    def _recreate_cm(self) -> "use_backend":  # of a decorated function: one for each call
        return use_backend(self.name)

    def __enter__(self) -> None:
        if self.name not in KNOWN:
            raise ValueError(f"use_backend: backend must be one of {', '.join(KNOWN)}; got {self.name!r}")
        reason = absent(self.name)
        if reason is not None:
            raise RuntimeError(f"use_backend: backend {self.name!r} is unavailable: {reason}")
        if torch.compiler.is_dynamo_compiling():
            self.outside = context.trace(self.name)
        else:
            context.enter(self)

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            context.trace(self.outside)
        else:
            context.leave(self)


def available_backends() -> Availability:
    """Tells which backend serves which op on which device here, and the reason where a backend is absent.

    Returns:
        ``{"serves": {device: {op: backend}}, "absent": {backend: reason}}``, for the devices ``cpu`` and, where torch
            sees one, ``cuda`` or ``xpu``;
        for bf16 logits of a vocabulary of 131072, where the choice depends on that.

    Example:
        >>> available_backends()["serves"]["cpu"]["gae"] in ("cpu", "eager")
        True
    """
    devices = ["cpu"]
    devices += [d for d in ("cuda", "xpu") if getattr(torch, d).is_available()]
    serves = {
        device: {op: serving(op, device, torch.bfloat16, 131072, aloud=False) for op in OPS} for device in devices
    }
    return {"serves": serves, "absent": {name: reason for name in KNOWN if (reason := absent(name)) is not None}}
