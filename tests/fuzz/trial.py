"""One random call: the functions under test, what surrounds the call, and the comparison with the truth."""

import contextlib
import math
from collections import Counter

import torch
from reference import same_bits

import rlkernels
from fuzz.draws import Draw

CASES = {}
"""Kind of calls -> name of the case -> the function that makes one of them."""
# The truth itself is rounded: a unit of float64 is no bound for what is held against it.
EPS32, EPS64 = 2.0**-23, 2.0**-49


SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24, torch.float64: 1e-300}


def case(kind):
    """Registers a case: a function of a trial."""

    def register(function):
        CASES.setdefault(kind, {})[function.__name__] = function
        return function

    return register


def eps(x):
    """Of the arithmetic that serves the dtype of ``x``."""
    return EPS64 if x.dtype == torch.float64 else EPS32


def _setting(get, set_, value):
    """A context in which a setting of torch is another one."""

    @contextlib.contextmanager
    def context():
        before = get()
        set_(value)
        try:
            yield
        finally:
            set_(before)

    return context


SURROUNDINGS = {
    "bf16 is the default": _setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "fp64 is the default": _setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "meta is the default": lambda: torch.device("meta"),
    "three threads": _setting(torch.get_num_threads, torch.set_num_threads, 3),
}


class Trial:
    """One case with one seed.

    ``change``: what a self-test does to each result; ``limits``: those of ``Draw``; ``plain``: in no odd surroundings.
    """

    def __init__(self, name, seed, backend=None, change=None, plain=False, **limits):
        self.name, self.seed, self.backend, self.change = name, seed, backend, change
        self.draw = Draw(f"{name} {seed}", **limits)
        self.findings, self.calls, self.keywords = [], Counter(), set()
        odd, self._compiled = self.draw.flag(0.1), self.draw.flag(0.004) and not plain
        self._settings = (
            SURROUNDINGS[self.draw.choice(tuple(SURROUNDINGS))] if odd and not plain else contextlib.nullcontext
        )

    def run(self, function):
        """The findings of one trial of ``function``."""
        try:
            function(self)
        except Exception as error:  # whatever it is: this call was to be valid
            self.findings.append(f"raised {type(error).__name__}: {str(error)[:300]}{_place(error)}")
        return self.findings

    @contextlib.contextmanager
    def surroundings(self):
        """Settings of the process that must change nothing, and the chosen backend."""
        with (
            self._settings(),
            contextlib.nullcontext() if self.backend is None else rlkernels.use_backend(self.backend),
        ):
            yield

    def call(self, name, *arguments, **options):
        """A public function; its arguments stay as they are."""
        self.calls[name] += 1
        self.keywords |= {f"{name} {option}" for option, x in options.items() if x is not None}
        given = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
        before = [x.detach().clone() for x in given]
        function = getattr(rlkernels, name)
        # A compiled program cannot look into a tensor, so a 0 in one does not switch a term off.
        kept = {option for option, x in options.items() if self._compiled and isinstance(x, (int, float)) and x == 0}
        options = {option: x if option in kept else self.draw.dressed(option, x) for option, x in options.items()}
        if self._compiled:
            torch._dynamo.reset()
            function = torch.compile(function, backend="eager")
        with self.surroundings():
            result = function(*arguments, **options)
        if not all(same_bits(x.detach(), was) for x, was in zip(given, before, strict=True)):
            self.findings.append(f"{name} changed one of its arguments")
        return result if self.change is None else self.change(result)

    def gradients(self, outputs, inputs, upstream):
        """Of each input, zeros where nothing came; the backward runs in the same surroundings as the call."""
        with self.surroundings():
            found = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
        return [
            torch.zeros(x.shape, dtype=x.dtype, device="cpu") if g is None else g
            for g, x in zip(found, inputs, strict=True)
        ]

    def expect(self, what, got, truth, allowed):
        """``got`` is the rounding, to its dtype, of some number within ``allowed`` of the truth; infinite and NaN where
        the truth is.
        """
        if not isinstance(got, torch.Tensor) or got.shape != truth.shape:
            self.findings.append(
                f"{what}: {tuple(got.shape) if isinstance(got, torch.Tensor) else got!r}, expected "
                f"shape {tuple(truth.shape)}"
            )
            return
        got, truth = got.detach(), truth.detach().double()
        # Below its normal numbers a dtype has no digits to promise.
        allowed = torch.as_tensor(allowed, dtype=torch.float64).nan_to_num(0.0, math.inf).expand(
            truth.shape
        ) + SMALLEST.get(got.dtype, 0.0)
        low, high = truth - allowed, truth + allowed
        if got.dtype.is_floating_point:
            low, high = low.to(got.dtype), high.to(got.dtype)
        good = (low <= got) & (got <= high) | (got == truth) | got.isnan() & truth.isnan()
        if not good.all():
            at = (~good).nonzero()[0].tolist()
            here = tuple(at)
            self.findings.append(
                f"{what}: got {got[here].item():.9g}, truth {truth[here].item():.9g}, allowed "
                f"{allowed[here].item():.2g}, at {at}; "
                f"{int((~good).sum())} of {good.numel()} are off"
            )


def _place(error):
    """The line of ours that raised, for the reader of a finding."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        found = f" (at {'/'.join(path.rsplit('/', 2)[1:])}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found
