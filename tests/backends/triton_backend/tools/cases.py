"""Every variant of a kernel that is launched: the launchers called with empty CPU tensors, under
``launches.recording``.

The classes of ``launch_configs.TABLE`` and the registered objectives are walked, so a new entry is compiled without a
line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from flat_backend import Flat

from rlkernels.backends.protocol import RowBatch
from rlkernels.backends.triton import divergence_kernel as two_models
from rlkernels.backends.triton import launch as backend
from rlkernels.backends.triton import launch_configs
from rlkernels.objectives import OBJECTIVES

NVIDIA, AMD = ("sm_80", "sm_90", "sm_100", "sm_120"), ("gfx942", "gfx1100")
EVERY, TWO, ONE = NVIDIA + AMD, ("sm_90", "gfx942"), ("sm_90",)
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
BIG = 151_936
SMALL = 1024
ROWS = 4


class Case(NamedTuple):
    """A name, the call that launches, and the targets that it is compiled for."""

    name: str
    call: Callable
    targets: tuple[str, ...]


def real(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(dtype, vocab, masked=False, per_row=False):
    """The arguments that every kernel over rows takes, up to vocab_mask."""
    temperature = torch.ones(ROWS, dtype=real(dtype)) if per_row else 0.7
    mask = torch.ones(ROWS, vocab, dtype=torch.bool) if masked else None
    return torch.empty(ROWS, vocab, dtype=dtype), torch.zeros(ROWS, dtype=torch.int64), temperature, -100, mask


def stats(dtype, vocab, wanted, ref=False, **flags):
    x, *rest = rows(dtype, vocab, **flags)
    return lambda: Flat(backend).token_stats(x, *rest, torch.empty_like(x) if ref else None, wanted)


def backward(dtype, vocab, terms=(True, False, False), in_place=False, out=None, **flags):
    x, *rest = rows(dtype, vocab, **flags)
    column = torch.zeros(ROWS, dtype=real(dtype))
    upstream = [column if term else None for term in terms]
    reference = (
        [torch.empty_like(x), *[column] * 3, column, column, column]
        if terms[2]
        else [None, *[column] * 3, None, None, None]
    )
    return lambda: Flat(backend).token_stats_backward(
        *upstream, x, *rest, *reference, x if in_place else out and torch.empty_like(x, dtype=out)
    )


def policy(name, dtype, vocab, entropy=True, kl="k3", with_grad=True, out=None, **flags):
    x, *rest = rows(dtype, vocab, **flags)
    column = torch.zeros(ROWS, dtype=real(dtype))
    entry = OBJECTIVES[name]
    extra = (column if entropy else None, kl, column if kl else None, column if kl else None)
    out = out and torch.empty_like(x, dtype=out)
    return lambda: Flat(backend).fused_policy(
        name, x, *rest, [column] * (len(entry.columns) - 1), [0.5] * len(entry.params), column, *extra, with_grad, out
    )


def divergence(kind, dtype, vocab, with_grad=True, out=None, **flags):
    x, *rest = rows(dtype, vocab, **flags)
    weight = torch.zeros(ROWS, dtype=real(dtype)) if with_grad else None
    out = out and torch.empty_like(x, dtype=out)
    batch = RowBatch(x, *rest, torch.empty_like(x))
    return lambda: two_models.divergence(batch, kind, 0.5, weight, out)


def objective(name, weighted, dtype=torch.float32):
    column, entry = torch.zeros(4096, dtype=dtype), OBJECTIVES[name]
    return lambda: backend.elementwise(
        name, [column] * len(entry.columns), [0.5] * len(entry.params), column if weighted else None
    )


def weighted(name, taken=0, mask=False, counted=False, dtype=torch.float32):
    column, entry = torch.zeros(4096, dtype=dtype), OBJECTIVES[name]
    others, total = [column] * (len(entry.columns) - 1), torch.tensor(3) if counted else None
    weight = torch.ones(4096, dtype=torch.bool) if mask else None if taken else column
    return lambda: backend.weighted_loss(
        name, column, [column] * taken, others, [0.5] * len(entry.params), weight, total, 0.5
    )


def scan(masked, packed, has_mask):
    r = torch.zeros(64) if packed else torch.zeros(4, 16)
    ends, mask = (
        torch.tensor([0, 30, 64]) if packed else None,
        torch.ones(r.shape, dtype=torch.bool) if has_mask else None,
    )
    return lambda: backend.gae(r, r.clone(), mask, ends, 0.99, 0.95, masked)


BUILDERS = {
    "token_stats": lambda dtype, vocab, **flags: stats(dtype, vocab, 1, **flags),
    "token_stats_ref": lambda dtype, vocab, **flags: stats(dtype, vocab, 17, ref=True, **flags),
    "token_stats_backward": lambda dtype, vocab, **flags: backward(dtype, vocab, (True, True, False), **flags),
    "token_stats_backward_ref": lambda dtype, vocab, **flags: backward(dtype, vocab, (True, True, True), **flags),
    "fused_policy": lambda dtype, vocab, **flags: policy("ppo_clip", dtype, vocab, **flags),
}


def every_case():
    """The hot variants for every target, each class of the table and the other flags for fewer."""
    yield Case("entropy", stats(torch.bfloat16, BIG, 1), EVERY)
    yield Case("entropy fp32", stats(torch.float32, BIG, 1), EVERY)
    yield Case("two models", stats(torch.bfloat16, BIG, 17, ref=True), EVERY)
    yield Case("everything masked", stats(torch.bfloat16, BIG, 31, ref=True, masked=True), EVERY)
    yield Case(
        "everything masked, temperatures", stats(torch.bfloat16, BIG, 31, ref=True, masked=True, per_row=True), TWO
    )
    yield Case("everything fp32", stats(torch.float32, BIG, 31, ref=True, masked=True, per_row=True), EVERY)
    yield Case("gradient", backward(torch.bfloat16, BIG, (True, True, False)), EVERY)
    yield Case(
        "gradient of everything fp32",
        backward(torch.float32, BIG, (True, True, True), masked=True, per_row=True),
        EVERY,
    )
    yield Case("policy", policy("ppo_clip", torch.bfloat16, BIG), EVERY)
    yield Case("policy masked", policy("ppo_clip", torch.bfloat16, BIG, masked=True), EVERY)
    yield Case("policy masked, temperatures", policy("ppo_clip", torch.bfloat16, BIG, masked=True, per_row=True), TWO)
    yield Case("policy fp32 masked", policy("dual_clip", torch.float32, BIG, masked=True, per_row=True), EVERY)
    yield Case("head policy", policy("ppo_clip", torch.float32, BIG, out=torch.bfloat16), EVERY)
    yield Case("head gradient", backward(torch.float32, BIG, (True, True, False), out=torch.bfloat16), EVERY)
    yield Case("objective", objective("ppo_clip", True), EVERY)
    yield Case("weighted loss", weighted("ppo_clip", mask=True, counted=True), EVERY)
    yield Case("weighted pairs", weighted("pairwise", taken=1), EVERY)
    yield Case("scan", scan("skip", False, True), EVERY)
    yield Case("divergence forward_kl", divergence("forward_kl", torch.bfloat16, BIG), TWO)
    yield Case("divergence jsd", divergence("jsd", torch.bfloat16, BIG), TWO)
    yield Case("divergence jsd masked", divergence("jsd", torch.float32, BIG, masked=True, per_row=True), ONE)
    yield Case("divergence reverse_kl", divergence("reverse_kl", torch.float32, BIG, out=torch.bfloat16), ONE)
    yield Case("divergence cross_entropy", divergence("cross_entropy", torch.bfloat16, BIG, with_grad=False), ONE)
    for (op, itemsize), entries in launch_configs.TABLE.items():
        for largest, config in entries:
            vocab = min(largest, BIG) // 16 * 16
            yield Case(
                f"{op} {itemsize} bytes {config}", BUILDERS[op](DTYPES[itemsize], vocab), TWO if itemsize == 2 else ONE
            )
    for (op, itemsize), entries in launch_configs.MASKED.items():
        yield Case(
            f"{op} {itemsize} bytes masked {entries[0][1]}", BUILDERS[op](DTYPES[itemsize], SMALL, masked=True), TWO
        )
    for op, build in BUILDERS.items():
        yield Case(f"{op} fp16", build(torch.float16, BIG), TWO)
        yield Case(f"{op} one column", build(torch.bfloat16, 1), ONE)
        yield Case(f"{op} odd vocabulary", build(torch.bfloat16, 50_257), ONE)
    for wanted, ref, masked in (
        (0, False, False),
        (0, True, False),
        (31, True, False),
        (1, False, True),
        (17, True, True),
    ):
        yield Case(
            f"token_stats {wanted} {ref} {masked}", stats(torch.bfloat16, BIG, wanted, ref=ref, masked=masked), TWO
        )
    for terms in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        yield Case(f"gradient {terms}", backward(torch.bfloat16, BIG, terms, in_place=terms[1]), ONE)
    for name, entry in OBJECTIVES.items():
        if entry.columns[0] == "logp" and "ref_logp" not in entry.columns:
            yield Case(f"policy {name}", policy(name, torch.bfloat16, 32_000, entropy=False, kl=None), ONE)
        yield Case(f"objective {name}", objective(name, False), ONE)
        yield Case(f"weighted {name}", weighted(name), ONE)
    yield Case("weighted fp64", weighted("ppo_clip", mask=True, counted=True, dtype=torch.float64), ONE)
    yield Case("weighted pairs with a margin", weighted("pairwise", taken=2), ONE)
    yield Case("objective fp64", objective("ppo_clip", True, torch.float64), ONE)
    yield Case("policy without gradient", policy("ppo_clip", torch.bfloat16, BIG, with_grad=False), ONE)
    for masked, packed, has_mask in (("skip", False, False), ("zero", False, True), ("skip", True, True)):
        yield Case(f"scan {masked} {packed} {has_mask}", scan(masked, packed, has_mask), ONE)
