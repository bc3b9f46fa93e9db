"""Compiles the Triton kernels that this suite launches before the suite runs, on the processors alone.

``GPU_SUITE_DEVICE=cpu pytest tests/backends/gpu --compile-ahead FOLDER --compile-target sm_90``: the tests run on plain
torch. Each call of an op is made to Triton's launchers too, which are kept from launching and say what they would
compile. A kernel is compiled once, by the worker that first puts a file for it into FOLDER, and lies in Triton's cache
when the suite runs on the device.
"""

import contextlib
import hashlib
import os
import sys
import types
from pathlib import Path

import torch

from rlkernels import backends

TOOLS = Path(__file__).resolve().parents[1] / "triton_backend" / "tools"
CARRIER = "eager"
"""The backend that gives the tests their numbers: the only one that is always there."""


class Ahead:
    """Stands in for a backend: records, compiles, and answers as that backend does."""

    def __init__(self, folder, target):
        sys.path.insert(0, str(TOOLS))
        import launches

        self.launches, self.folder, self.target = launches, Path(folder), target
        self.triton, self.failed = backends.BACKENDS["triton"], 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def install(self):
        real = backends.BACKENDS[CARRIER]
        names = {name: self.wrapped(name, getattr(real, name)) for name in backends.OPS}
        backends.BACKENDS[CARRIER] = types.SimpleNamespace(**{**vars(real), **names})

    def wrapped(self, name, function):
        def call(*arguments, **options):
            with contextlib.suppress(Exception):  # refused by Triton, as the tests of refusals mean it
                self.compile(self.recorded(name, arguments, options))
            return function(*arguments, **options)

        return call

    def recorded(self, name, arguments, options):
        """The launches of a call. Nothing runs, so what it leaves in the memory for a result is put back."""
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
        before = [x.detach().clone() for x in tensors]
        with torch.no_grad(), self.launches.recording(self.target) as found:
            try:
                getattr(self.triton, name)(*arguments, **options)
            finally:
                for x, kept in zip(tensors, before, strict=True):
                    x.copy_(kept)
        return found

    def compile(self, found):
        for launch in found:
            name = hashlib.sha256(f"{launch.kernel} {launch.key}".encode()).hexdigest()
            try:
                os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            try:
                self.launches.compiled(launch)
            except Exception:
                self.failed += 1
