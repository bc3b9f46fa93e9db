"""The registration of an op with torch: its schema, its fake, its autograd formula, and the way past the dispatcher.

A call with plain tensors outside of every mode goes straight to the implementation, with the same autograd formula
(``rlkernels.tracing``); any other call takes the registered op.
"""

from collections import Counter

import torch

from rlkernels import checks
from rlkernels.backends import BACKENDS
from rlkernels.tracing import gradient_wanted, has_values, registered

DOUBLE_BACKWARD = (
    "double backward is not supported by rlkernels; use plain torch operations where second derivatives are needed"
)

_library = torch.library.Library("rlkernels", "DEF")
_calls: Counter[tuple[str, str]] = Counter()


def calls():
    """Counts of how often each ``(op, backend)`` has run in this process; a snapshot."""
    return Counter(_calls)


def run(op, backend, *arguments):
    """Calls the backend's function; counted."""
    _calls[op, backend] += 1
    try:
        return getattr(BACKENDS[backend], op)(*arguments)
    except checks.NAMED as error:  # a backend reads values and sees layouts, and does not know the function's name
        if type(error) not in checks.NAMED:
            raise
        raise checks.named(error, op, op) from error


def define(name, schema, implementation, fake, formula=None, setup=None, dispatched=None):
    """Registers an op with its fake and, unless it mutates, its autograd formula.

    Without one, a derivative of it is an error. ``dispatched``: the implementation for torch's dispatcher, where that
    must differ.

    The result is what to call; its ``op`` is the registered op. A tensor argument that is a number may be given as a
    float, one that is a row of numbers as a tuple of them.
    """
    _library.define(f"{name}{schema}")
    _library.impl(name, dispatched or implementation, "CompositeExplicitAutograd")
    # The gate of the backends carries out a pending negation, because torch's own way fails for an op without a result.
    _library.impl(name, torch.library.fallthrough_kernel, "Negative")
    torch.library.register_fake(f"rlkernels::{name}", fake, lib=_library)
    recorded, formula, setup = implementation, formula or _raises, setup or (lambda ctx, inputs, output: None)
    if "!" not in schema:
        # For the backward ops this makes the second derivative an error: autograd would treat the first one as a
        # constant.
        torch.library.register_autograd(f"rlkernels::{name}", formula, setup_context=setup, lib=_library)
        recorded = _recorded(name, implementation, formula, setup)
    op = getattr(torch.ops.rlkernels, name).default

    def call(*arguments):
        wanted = None if torch.compiler.is_compiling() else gradient_wanted(arguments)
        if wanted is None:
            return op(*registered(arguments))
        return recorded(*arguments) if wanted else implementation(*arguments)

    call.op = op
    return call


def _recorded(name, implementation, formula, setup):
    """Wraps the same op for a call that autograd records outside of the dispatcher."""

    def forward(ctx, *arguments):
        output = implementation(*arguments)
        setup(ctx, arguments, output)
        return output

    def backward(ctx, *grads):
        # Of a list of tensors: a list of None.
        return tuple([None if type(g) is list else g for g in formula(ctx, *grads)])

    base = torch.autograd.Function
    function = type(base)(name, (base,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    # Its own apply looks for wrappers of functorch in every argument, which are not plain.
    return super(base, function).apply


def _raises(ctx, *grads):
    raise RuntimeError(DOUBLE_BACKWARD)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, x, logp):
        ctx.name = name
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError(f"{ctx.name} has no gradient; detach() it, or leave it out of the loss")


def without_gradient(name, x, logp):
    """Returns a copy of a statistic through which a backward raises, because a loss of it would train without that
    term.

    ``x`` itself where it is differentiable or ``logp`` is not, and in a compiled or transformed program.
    """
    return _Refusal.apply(name, x, logp) if logp.requires_grad and not x.requires_grad and has_values(logp) else x
