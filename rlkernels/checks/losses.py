"""The checks of what losses take: logits and their targets, masks, labels, counts, pairs, parameters of objectives."""

import math
import sys
from typing import get_args

import torch

from rlkernels.checks import tensors
from rlkernels.checks.names import choice, known_names
from rlkernels.checks.numbers import positive, real
from rlkernels.checks.tensors import FLOAT_NAMES, FLOATS, WHOLE, WHOLE_NAMES
from rlkernels.types import RowKL

ROW_KLS = get_args(RowKL)
COLDEST, HOTTEST = 2.0**-40, 2.0**40
"""The limits of a temperature ``T``, because the gradient of an entropy holds ``1/T**2`` in fp32.

At 1e-20 that gradient was NaN, and at 1e-40 the best token had the log-probability -log V.
"""


NORMALIZERS = (
    "batch_num_tokens",
    "count_empty_rows",
    "dp_size",
    "group_ids",
    "group_rows",
    "group_tokens",
    "horizon",
    "num_sequences",
    "rollout_ids",
    "scale",
)
"""Names that an aggregation may be given. A caller who passes one as a keyword of its own is told where it belongs."""


def logits(caller, x, name="logits"):
    """Refuses logits that are not ``[..., V]`` with at least one column."""
    tensors.floating(caller, name, x)
    if x.dim() < 1:
        raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected [..., V]")
    if x.shape[-1] == 0:
        raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}: the vocabulary dimension is empty")


def targets(caller, x, rows):
    """Refuses targets that are not int32 or int64 of the shape ``rows``."""
    tensors.tensor(caller, "targets", x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{caller}: targets must be int32 or int64, got {x.dtype}")
    tensors.shape(caller, "targets", x, rows)


def vocab_mask(caller, x, logits_shape):
    """Refuses a vocabulary mask that is not bool, ``[V]`` or shaped like the logits."""
    if x is None:
        return
    tensors.tensor(caller, "vocab_mask", x)
    if x.dtype != torch.bool:
        raise TypeError(f"{caller}: vocab_mask must be bool, got {x.dtype}; True keeps a column")
    if x.shape != logits_shape[-1:] and x.shape != logits_shape:
        raise ValueError(
            f"{caller}: vocab_mask has shape {tuple(x.shape)}, expected {tuple(logits_shape[-1:])} or "
            f"{tuple(logits_shape)}"
        )


def temperature(caller, x, rows):
    """Returns a temperature as a float, or as a tensor of shape ``rows``.

    A tensor may hold one temperature per row, one per sequence (``rows`` without its last size, or with a 1 in its
    place), or one for all. That one is read on a CPU alone.
    """
    if not isinstance(x, torch.Tensor) or (
        x.dim() == 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    ):
        x = positive(caller, "temperature", x)
        within_reach(caller, "temperature", x)
        return x
    tensors.floating(caller, "temperature", x)
    tensors.no_gradient(caller, temperature=x)
    if x.shape == rows:
        return x.resolve_neg()
    of_sequences = rows[:-1]
    if x.shape not in ((), of_sequences, (*of_sequences, 1)):
        raise ValueError(
            f"{caller}: temperature has shape {tuple(x.shape)}, expected {tuple(rows)}, or "
            f"{tuple(of_sequences)} or {(*of_sequences, 1)}: one for "
            "each sequence; or a number"
        )
    return (x.unsqueeze(-1) if x.dim() and x.shape == of_sequences else x).resolve_neg().expand(rows)


def within_reach(caller, name, x, limit="a bound"):
    """Refuses a factor or divisor of logits that fp32 cannot take.

    ``limit``: the words for what the caller of the library may pass instead of a value beyond the limit.
    """
    if not COLDEST <= x <= HOTTEST:
        raise ValueError(
            f"{caller}: {name} must be from 2**-40 (9.1e-13) to 2**40 (1.1e12), got {x}; {limit} is as good as its "
            "limit"
        )


def reference(caller, x, logits_, kl):
    """Refuses ``ref_logits`` that do not match ``logits``, and a ``kl`` that is unknown or lacks them."""
    if kl is not None:
        choice(caller, "kl", kl, ROW_KLS)
        if x is None:
            raise ValueError(f"{caller}: kl={kl!r} needs ref_logits")
    if x is None:
        return
    tensors.floating(caller, "ref_logits", x)
    tensors.shape(caller, "ref_logits", x, logits_.shape)
    if x.dtype != logits_.dtype:
        raise TypeError(f"{caller}: ref_logits has dtype {x.dtype}, logits {logits_.dtype}; cast one of them")
    tensors.no_gradient(caller, ref_logits=x)


def outputs(caller, names, known):
    """Refuses names of outputs that are not among the ``known`` ones."""
    known_names(caller, "outputs", names, known)


def mask(caller, x, expected, name="mask", counts=False):
    """Refuses what is no mask of the shape ``expected``; None is a mask of all tokens.

    A mask is bool, or integers (not 0: live), or floats that are 0 and 1. ``counts``: floats may have other values,
    because they count tokens.
    """
    if x is None:
        return
    tensors.tensor(caller, name, x)
    if x.dtype not in (*FLOATS, *WHOLE):
        raise TypeError(
            f"{caller}: {name} must be bool, integer or floating, got {x.dtype}; supported: bool, "
            f"{WHOLE_NAMES}, {FLOAT_NAMES}"
        )
    tensors.shape(caller, name, x, expected)
    tensors.no_gradient(caller, **{name: x})
    if x.dtype.is_floating_point and not counts:
        _zeros_and_ones(caller, name, x)


def labels(caller, name, x, expected):
    """Refuses labels of two classes that are not bool, or 0 and 1."""
    mask(caller, x, expected, name)
    if x.dtype != torch.bool:
        _zeros_and_ones(caller, name, x)


def counts(caller, name, x, expected):
    """Refuses numbers of tokens that are below 0 or NaN, where the host reads them."""
    mask(caller, x, expected, name, counts=True)
    if tensors.host_reads(x) and not (x >= 0).all():
        raise ValueError(f"{caller}: {name} holds {x[~(x >= 0)][0].item()}, expected numbers of tokens, at least 0")


def _zeros_and_ones(caller, name, x):
    """Refuses values other than 0 and 1, where the host reads them."""
    if tensors.host_reads(x) and not torch.equal((x != 0).to(x.dtype), x):
        raise ValueError(
            f"{caller}: {name} holds {x[(x != 0) & (x != 1)][0].item()}, expected 0 and 1 alone; weights "
            "of tokens go into weights=, an "
            f"additive mask is {name} == 0"
        )


def pairs(caller, chosen, rejected, names=("chosen", "rejected")):
    """Refuses numbers of pairs that differ in shape or device, or are not floats."""
    for name, x in zip(names, (chosen, rejected), strict=True):
        tensors.floating(caller, name, x)
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"{caller}: {names[0]} has {chosen.numel()} pairs, {names[1]} has {rejected.numel()}; one "
            "score each per pair, got shapes "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    tensors.one_device(caller, names[0], chosen, **{names[1]: rejected})


def params(caller, objective, entry, keywords, like):
    """Returns the values of the objective's parameters, in the order in which the objective takes them.

    ``keywords``: the caller's; without one, the default of the objective's signature stands.
    """
    for name in keywords:
        if name not in entry.params:
            known = f"it takes {', '.join(entry.params)}" if entry.params else "it takes no parameters"
            if name in NORMALIZERS:
                known = f"pass normalizers={{{name!r}: ...}}"
            raise TypeError(f"{caller}: objective {objective!r} takes no {name!r}; {known}")
    values, plain, ordered = {**dict(entry.defaults), **keywords}, True, []
    for name in entry.params:
        if name not in values:
            raise TypeError(f"{caller}: objective {objective!r} needs {name!r}")
        if type(values[name]) is not float:
            values[name] = tensors.coefficient(real, caller, name, values[name], like)
            plain = plain and not isinstance(values[name], torch.Tensor)
        ordered.append(values[name])
    if not entry.ours:
        return ordered  # what a parameter of a user's objective means is the user's
    for name, x in zip(entry.params, ordered, strict=True):
        if name in _RANGES and (plain or not isinstance(x, torch.Tensor)):
            _RANGES[name](caller, objective, name, x)
    return ordered


def _clip_low(caller, objective, name, x):
    # 1 is no lower bound, because a ratio is never below 0.
    if not 0 <= x <= 1:
        raise ValueError(f"{caller}: {name} must be in [0, 1], got {x}")


def _clip_high(caller, objective, name, x):
    # CISPO's weight may have no upper bound.
    if not 0 <= x <= (math.inf if objective == "cispo" else sys.float_info.max):
        raise ValueError(f"{caller}: {name} must be in [0, inf), got {x}")


def _dual_clip(caller, objective, name, x):
    if not x > 1:
        raise ValueError(f"{caller}: {name} must be > 1, got {x}")


def _not_negative(caller, objective, name, x):
    if not x >= 0:
        raise ValueError(f"{caller}: {name} must be >= 0, got {x}")


def _positive(caller, objective, name, x):
    positive(caller, name, x)


_RANGES = {
    "clip_low": _clip_low,
    "clip_high": _clip_high,
    "dual_clip": _dual_clip,
    **dict.fromkeys(("delta", "delta_low", "delta_high"), _not_negative),
    **dict.fromkeys(("beta", "tau_pos", "tau_neg", "clip_range", "ratio_cap", "ratio_max"), _positive),
}
"""The check of each parameter that has a range, whichever of the library's objectives takes it."""
