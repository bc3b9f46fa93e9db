"""What the tests on an accelerator share: where they run, on which backends, and the judges against float64.

``GPU_SUITE_DEVICE=cpu`` rehearses what needs no GPU on the CPU's backends: the tests' own logic, not a kernel for a
GPU. ``GPU_SUITE_BACKEND`` names the backend of a rehearsal.
"""

import contextlib
import os

import oracles
import pytest
import reference
import torch

import rlkernels
from rlkernels.backends import DEVICES, absent, cuda
from rlkernels.objectives import OBJECTIVES

DEVICE = torch.device(os.environ.get("GPU_SUITE_DEVICE", "cuda"))
REHEARSAL = DEVICE.type == "cpu"
BACKENDS = (os.environ.get("GPU_SUITE_BACKEND", "cpu"),) if REHEARSAL else ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMS = {
    **{"order": 3.0, "low": -0.5, "high": 0.7, "value_low": -0.1, "value_high": 0.2, "cap": 1.5},  # of kl_term
    **{"moving": 1.0, "straight": 0.0},
    "ratio_cap": 1.1,
    "ratio_max": 1.5,
    "delta_low": 0.03,
    "delta_high": 0.02,
    "delta": 0.05,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "tau": 0.05,
    "alpha": 0.5,
}
POLICIES = sorted(
    n
    for n, o in OBJECTIVES.items()
    # The rollout's objectives take another argument, and DRO's derivative cancels, where the allowance is relative.
    if o.columns[0] == "logp" and "advantage" in o.columns and "rollout_logp" not in o.columns and n != "dro"
    if hasattr(oracles, n)
)
CUDA_ONLY = pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")
"""For what has no meaning in a rehearsal: streams, graphs, the memory of a GPU."""


def missing(name):
    """Why a backend cannot be tested here, or None."""
    reason = absent(name)
    if reason is None and name != "eager" and name not in DEVICES.get(DEVICE.type, ()):
        reason = f"it does not serve {DEVICE.type}"
    return reason


def using(name):
    return rlkernels.use_backend(name)


TEAMS = (-1, 1, 2, 4, 8)
"""The ways of CUDA's policy loss through a row: read twice (-1), or kept by so many blocks."""


@contextlib.contextmanager
def team(blocks):
    """Forces one of ``TEAMS``. Without the CUDA module there is nothing to force.

    A device without clusters skips.
    """
    if cuda._cuda is None:
        yield
        return
    if blocks > 1 and not REHEARSAL and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this device has no clusters of blocks")
    cuda._cuda.choose(blocks)
    try:
        yield
    finally:
        cuda._cuda.choose()


def sync():
    if not REHEARSAL:
        torch.cuda.synchronize()


def put(x):
    """To the device, strides and all, where ``x`` is a tensor."""
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def rows(shape, vocab, dtype=torch.float32, seed=0):
    """``reference.draw_rows`` on the device."""
    return tuple(put(x) for x in reference.draw_rows(shape, vocab, dtype, seed))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator(device=DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def cotangents(shape, count, seed=1):
    return tuple(put(g) for g in reference.cotangents(shape, count, seed))


def laid_out(name, x):
    """``x`` in another layout, built on the device: a copy to it would undo the layout."""
    with torch.device(DEVICE):
        return reference.LAYOUTS[name](x)


def bits(a, b):
    return reference.same_bits(a, b)


def judge(backend, x, targets, temperature=1.0, *, vocab_mask=None, ref_logits=None, seed=1):
    """Every output of ``token_stats`` and the gradient of each, against float64 on the device; the
    stats are returned.
    """
    options = {"ignore_index": -100, "vocab_mask": vocab_mask, "ref_logits": ref_logits}
    leaf, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    with using(backend):
        stats = rlkernels.token_stats(
            leaf,
            targets,
            temperature=temperature,
            kl=None if ref_logits is None else "exact",
            outputs=outputs,
            **options,
        )
    truth = reference.statistics(wide, targets, temperature, **options)
    narrow = {**options, "ref_logits": None if ref_logits is None else ref_logits.float()}
    base = reference.statistics(x.detach().float(), targets, temperature, **narrow, dtype=torch.float32)
    for name, expected in truth.items():
        got = getattr(stats, name)
        if name == "is_top1":
            assert torch.equal(got, expected), name
            continue
        assert got.dtype == torch.float32 and got.device.type == DEVICE.type
        reference.assert_within_policy(got, expected, base[name], name)
    names = ("logprobs", "entropy") if ref_logits is None else ("logprobs", "entropy", "kl")
    for name, g in zip(names, cotangents(targets.shape, len(names), seed), strict=True):
        (got,) = torch.autograd.grad(getattr(stats, name), leaf, g, retain_graph=True)
        (expected,) = torch.autograd.grad(truth[name], wide, g.double(), retain_graph=True)
        assert got.dtype == x.dtype
        allowed = reference.gradient_allowance({name: g}, x, targets, temperature, **options)
        reference.assert_gradient(got, expected, allowed, f"gradient of {name}")
    return stats


def policy_inputs(x, targets, temperature=1.0, seed=0):
    """Old and reference log-probabilities around those of ``x``, so that ratios meet both clips; advantages of both
    signs, a mask with holes.
    """
    logp = reference.statistics(x.double(), targets, temperature)["logprobs"].float()
    drift, ref, advantage, chance = (noise(*targets.shape, seed=seed + k) for k in range(4))
    return {"old": logp + 0.3 * drift, "ref": logp + 0.3 * ref, "advantage": advantage, "mask": chance < 1.0}


def policy_truth(objective, x, targets, columns, *, kl=None, kl_coef=0.0, entropy_coef=0.0, temperature=1.0):
    """Loss, gradient and the gradient's allowance in float64: the oracle over float64 statistics, mean over the live
    tokens.

    A log-probability is known to 1e-5 (the contract's bound), hence a ratio, and every derivative with one in it, to
    1e-5 of itself.
    """
    wide = x.detach().double().requires_grad_()
    live = columns["mask"] & (targets != -100)
    weight = live.double() / live.sum().clamp(min=1)
    stats = reference.statistics(wide, targets, temperature)
    logp = stats["logprobs"].detach().requires_grad_()
    named = {"old_logp": columns["old"].double(), "advantage": columns["advantage"].double()}
    entry = OBJECTIVES[objective]
    terms = getattr(oracles, objective)(
        logp, *(named[c] for c in entry.columns[1:]), *(PARAMS[p] for p in entry.params)
    )
    total = torch.where(live, terms, 0.0) * weight
    if kl is not None:
        total = total + kl_coef * weight * torch.where(live, getattr(oracles, kl)(logp, columns["ref"].double()), 0.0)
    (dlogp,) = torch.autograd.grad(total.sum(), logp)
    dentropy = -entropy_coef * weight
    loss = total.sum().detach() + (dentropy * torch.where(live, stats["entropy"].detach(), 0.0)).sum()
    (dlogits,) = torch.autograd.grad((stats["logprobs"], stats["entropy"]), wide, (dlogp, dentropy))
    upstream = {"logprobs": dlogp, "entropy": dentropy}
    allowed = (
        reference.gradient_allowance(upstream, x, targets, temperature)
        + 2e-5 * dlogits.abs()
        + 2e-5 * dlogp.abs()[..., None] * 1e-2
    )
    return loss, dlogits, allowed, total.abs().sum().item()


def captured(function, static):
    """``(graph, outputs)`` of ``function(static)``, captured after three runs on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, function(static)


@contextlib.contextmanager
def hidden_syncs_raise():
    """Any operation that makes the host wait for the device raises inside."""
    if REHEARSAL:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
