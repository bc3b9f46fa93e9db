"""What a launch would compile, and for how many variants: the real launchers and Triton's own argument handling on a
machine without a GPU.

    with recording("sm_90") as launches:
        Flat(backend).token_stats(...)            # CPU tensors stand in for device tensors; nothing runs
    launches[0].kernel, launches[0].key     # one entry per launch; equal keys share one compiled kernel

A fake driver names the target, so ``JITFunction.run`` binds, specialises and builds its cache key as it would on the
device; where it would compile, the arguments of the compiler are recorded instead. Works with Triton 3.5 to 3.9.
"""

from __future__ import annotations

import contextlib
import dataclasses

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


def target_of(name):
    """``GPUTarget`` of ``sm_90`` or ``gfx942``."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


@dataclasses.dataclass
class Launch:
    """One launch: the kernel, its cache key, and what the compiler would get."""

    function: JITFunction
    key: str
    signature: dict
    constants: dict
    attributes: dict
    options: object
    target: GPUTarget

    @property
    def kernel(self):
        return self.function.__name__

    def constant(self, name):
        """The value of a compile-time argument."""
        return self.constants[(self.function.arg_names.index(name),)]


class _Driver:
    def __init__(self, name):
        self.name = name

    def get_current_device(self):
        return self.name  # each target has its own kernel cache

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return target_of(self.name)


@contextlib.contextmanager
def recording(target):
    """Launches of the body, in order. Nothing is compiled and nothing runs."""
    launches = []

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        launches.append(Launch(self, key, signature, constexprs, attrs, options, target_of(device)))

    compile_, active = JITFunction._do_compile, driver._active if hasattr(driver, "_active") else None
    JITFunction._do_compile = record
    driver.set_active(_Driver(target))
    try:
        yield launches
    finally:
        JITFunction._do_compile = compile_
        driver._active = active


def compiled(launch, **options):
    """The compiled kernel of a recorded launch; ``options`` replace its own."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=launch.target, options={**launch.options.__dict__, **options})
