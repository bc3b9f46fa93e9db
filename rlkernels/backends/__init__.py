"""Which backend serves which op here, and why one is absent."""
import importlib
import importlib.util
import os
import threading
from contextlib import contextmanager

import torch

from rlkernels.backends import cpu, cuda, eager
from rlkernels.backends.choice import preferred

OPS = ("token_stats", "token_stats_backward", "fused_policy", "elementwise", "weighted_loss", "gae")
KNOWN = ("eager", "cpu", "triton", "cuda")
DEVICES = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager"), "xpu": ("triton", "eager"), "meta": ("eager",)}
"""Device type to the backends that can serve it, first choice first; ``choice.TABLE`` overrides the order where something was measured."""


class _Modules(dict):
    """Name to module. Triton's is imported when it first serves: ``import rlkernels`` must not load Triton."""

    def __missing__(self, name):
        self[name] = importlib.import_module(f"rlkernels.backends.{name}")
        return self[name]


BACKENDS = _Modules(eager=eager, cpu=cpu, cuda=cuda)
_forced = threading.local()
_present = set()  # accelerator backends that have been found: looking for Triton and a GPU again costs 30 us per call


def interpreted():
    """Whether Triton runs kernels on CPU tensors (``TRITON_INTERPRET=1``), which is how they are proven without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def absent(name):
    """Why backend ``name`` cannot be used here, or None where it can."""
    if name == "triton":
        found = importlib.util.find_spec("triton")
        if found is None or found.origin is None:  # a folder of that name on the path is found too, as a namespace
            return "Triton is not installed; install rlkernels[triton]"
        if not (torch.cuda.is_available() or torch.xpu.is_available() or interpreted()):
            return "torch sees no GPU here, and TRITON_INTERPRET=1 is not set"
        return None
    if name == "eager":
        return None
    present, reason = BACKENDS[name].available()
    return None if present else reason


def forced():
    """The backend chosen by ``use_backend`` in this thread, or None."""
    return getattr(_forced, "name", None)


def serving(op, device, dtype=None, vocab=None):
    """The backend that serves ``op`` on a device type, by the table of measurements where it has an entry for dtype and vocabulary.

    Raises:
        RuntimeError: no backend serves the device, or the forced one does not.
    """
    choices = DEVICES.get(device)
    if choices is None:
        raise RuntimeError(f"no backend for device {device}; available: {', '.join(sorted(DEVICES))}")
    name = getattr(_forced, "name", None)
    if name is not None:
        if name != "eager" and name not in choices and not (name == "triton" and device == "cpu" and interpreted()):
            raise RuntimeError(f"backend {name!r} does not serve device {device} (asked for {op}); move the tensors or leave use_backend")
        return name
    if len(choices) > 2:
        choices = preferred(op, device, dtype, vocab, choices)
    for name in choices:
        if name in _present:
            return name
        if absent(name) is None:
            if device != "cpu":
                _present.add(name)
            return name
    raise RuntimeError(f"no backend for device {device} is present here: {', '.join(choices)}")


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
        ``{"serves": {device: {op: backend}}, "absent": {backend: reason}}``, for the devices ``cpu`` and, where torch sees one, ``cuda`` or ``xpu``;
        for bf16 logits of a vocabulary of 131072, where the choice depends on that.
    """
    devices = ["cpu"]
    devices += [d for d in ("cuda", "xpu") if getattr(torch, d).is_available()]
    serves = {device: {op: serving(op, device, torch.bfloat16, 131072) for op in OPS} for device in devices}
    return {"serves": serves, "absent": {name: reason for name in KNOWN if (reason := absent(name)) is not None}}
