"""Triton's own launcher on a machine without a GPU: ``stand_in_driver.c`` stands in for the driver's library.

    with StandIn(folder).active() as launches:
        Flat(backend).token_stats(...)         # CPU tensors stand in for device tensors; nothing runs
    launches[0].parameters                     # name, type, what was given, the bytes that the driver got

Compiled as for sm_90, so Triton's cache serves what other tests have compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton
from launches import target_of
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SOURCE = Path(__file__).with_name("stand_in_driver.c")
CC = shutil.which(os.environ.get("CC", "cc"))
STREAM = 77
FORMATS = {"i1": "?", "u1": "B", "i8": "b", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}


class Parameter(NamedTuple):
    """One parameter of a kernel: the value that the caller gave, and the bytes that the driver got."""

    name: str
    type: str
    given: object
    got: bytes

    @property
    def expected(self):
        """The bytes of the value: an address, or a number of the parameter's type."""
        if self.type.startswith("*"):
            return struct.pack("Q", self.given.data_ptr())
        return struct.pack(FORMATS[self.type], self.given)


class Launched(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    parameters: list[Parameter]


def flat(name, type_, value):
    """The parameters of an argument: a tuple of arguments is one parameter each, and a compile-time one is none."""
    if isinstance(type_, tuple):
        for k, (inner, x) in enumerate(zip(type_, value, strict=True)):
            yield from flat(f"{name}[{k}]", inner, x)
    elif type_ != "constexpr":
        yield name, type_, value


class StandIn:
    """The library, built in ``folder``, and Triton's driver over it."""

    def __init__(self, folder):
        nvidia = Path(triton.__file__).parent / "backends/nvidia"
        path = Path(folder) / "libcuda.so.1"
        words = [CC, "-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,libcuda.so.1", f"-I{nvidia / 'include'}"]
        subprocess.run([*words, str(SOURCE), "-o", str(path)], check=True)
        # Loaded before Triton's module, which then finds the library by its name.
        self.library, self.folder = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL), str(folder)

    def driver(self):
        from triton.backends.nvidia import driver as nvidia

        made = nvidia.CudaDriver()
        made.get_current_device = lambda: 0
        made.get_current_stream = lambda device: STREAM
        made.get_device_capability = lambda device: (9, 0)
        made.get_current_target = lambda: target_of("sm_90")
        return made

    def fail(self):
        """Makes the next launch fail."""
        self.library.stand_in_fail(1)

    @contextlib.contextmanager
    def active(self, noted=True):
        """Launches of the body, in order; empty without ``noted``, for whoever times them."""
        launches, run, before = [], JITFunction.run, getattr(driver, "_active", None)

        def note(function, *args, grid, warmup, **kwargs):
            compiled = run(function, *args, grid=grid, warmup=True, **kwargs)
            bound = dict(zip(function.arg_names, args, strict=False)) | kwargs
            types = compiled.src.signature
            named = [p for name in function.arg_names for p in flat(name, types[name], bound[name])]
            sizes = [8 if t.startswith("*") else struct.calcsize(FORMATS[t]) for _, t, _ in named]
            self.library.stand_in_expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))
            run(function, *args, grid=grid, warmup=warmup, **kwargs)
            launches.extend([self._launched(function.__name__, named, sizes)] * self.library.stand_in_launches())
            return compiled

        os.environ["TRITON_LIBCUDA_PATH"] = self.folder
        try:
            driver.set_active(self.driver())
            if noted:
                JITFunction.run = note
            yield launches
        finally:
            JITFunction.run = run
            driver._active = before
            del os.environ["TRITON_LIBCUDA_PATH"]

    def _launched(self, kernel, named, sizes):
        shape = (ctypes.c_uint64 * 8)()
        self.library.stand_in_shape(shape)
        parameters = []
        for k, ((name, type_, given), size) in enumerate(zip(named, sizes, strict=True)):
            got = ctypes.create_string_buffer(size)
            self.library.stand_in_value(k, got)
            parameters.append(Parameter(name, type_, given, got.raw))
        return Launched(kernel, tuple(shape[:3]), *shape[3:6], parameters)
