"""Which backend serves which op here, and why one is absent."""
import threading
from contextlib import contextmanager

import torch

from rlkernels.backends import cpu, eager

OPS = ("token_stats", "token_stats_backward", "fused_policy", "elementwise", "gae")
BACKENDS = {"eager": eager, "cpu": cpu}
"""Name to module. A name of ``KNOWN`` that is not here is not part of this version."""
KNOWN = ("eager", "cpu", "triton", "cuda")
DEVICES = {"cpu": ("cpu", "eager"), "cuda": ("eager",), "xpu": ("eager",), "meta": ("eager",)}
"""Device type to the backends that can serve it, first choice first."""

_forced = threading.local()


def absent(name):
    """Why backend ``name`` cannot be used here, or None where it can."""
    if name == "eager":
        return None
    if name == "cpu":
        built, reason = cpu.available()
        return None if built else reason
    return "it is not part of this version of rlkernels"


def forced():
    """The backend chosen by ``use_backend`` in this thread, or None."""
    return getattr(_forced, "name", None)


def serving(op, device):
    """The backend that serves ``op`` on a device type.

    Raises:
        RuntimeError: no backend serves the device, or the forced one does not.
    """
    choices = DEVICES.get(device)
    if choices is None:
        raise RuntimeError(f"no backend for device {device}; available: {', '.join(sorted(DEVICES))}")
    name = forced()
    if name is not None:
        if name != "eager" and name not in choices:
            raise RuntimeError(f"backend {name!r} does not serve device {device} (asked for {op}); move the tensors or leave use_backend")
        return name
    return next(choice for choice in choices if absent(choice) is None)


@contextmanager
def use_backend(name):
    """Every op of this thread runs on backend ``name`` inside the context: ``"eager"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    An op, dtype or device that the backend lacks raises; nothing falls back in silence.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend is absent here; the message says why.
    """
    if name not in KNOWN:
        raise ValueError(f"use_backend: backend must be one of {', '.join(KNOWN)}; got {name!r}")
    reason = absent(name)
    if reason is not None:
        raise RuntimeError(f"use_backend: backend {name!r} is unavailable: {reason}")
    before = forced()
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


def backends():
    """Which backend serves which op on which device here, and the reason where a backend is absent.

    Returns:
        ``{"serves": {device: {op: backend}}, "absent": {backend: reason}}``, for the devices ``cpu`` and, where torch sees one, ``cuda`` or ``xpu``.
    """
    devices = ["cpu"]
    devices += [d for d in ("cuda", "xpu") if getattr(torch, d).is_available()]
    serves = {device: {op: serving(op, device) for op in OPS} for device in devices}
    return {"serves": serves, "absent": {name: reason for name in KNOWN if (reason := absent(name)) is not None}}
