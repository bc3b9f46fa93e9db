"""Targets and temperatures of the tokens of a batch; at dead tokens they are anything at all."""

import torch

from fuzz.draws import INF, NAN


def targets_in_batch(draw, batch, vocab):
    """``(argument, the same with dead ones ignored, ignore_index)``. Ignored targets die in the batch."""
    ignore = draw.choice((-100, -100, -1, 0, vocab))
    y, dead = draw.integers(0, vocab, batch.shape), ~batch.live
    if draw.flag(0.4):
        y = torch.where(draw.coins(batch.shape, 0.2), ignore, y)
    batch.live = batch.live & (y != ignore)
    known = torch.where(batch.live, y, ignore)
    garbage = draw.choice((vocab, vocab + 100, -7, -(2**31), 2**31 - 1))
    given = torch.where(dead & draw.coins(batch.shape, 0.5), garbage, y)
    return draw.laid_out(given.to(draw.choice((torch.int32, torch.int64))), keep=True), known, ignore


def shared_temperature(draw, shape, dtype):
    """``(argument, float64 per token)`` of one temperature for each sequence of ``[..., L]``, or for all."""
    form = draw.choice(((), shape[:-1], (*shape[:-1], 1))) if shape else ()
    t = draw.uniform(form, 0.3, 2.3, draw.choice((torch.float32, torch.bfloat16, torch.float64)))
    real = torch.float64 if dtype == torch.float64 or not form else torch.float32  # one for all is a number
    per_row = t.to(real).double()
    return draw.laid_out(t, keep=True), (per_row[..., None] if form and form == shape[:-1] else per_row).expand(shape)


def temperature_in_batch(draw, batch, dtype):
    """``(argument, float64 per token)``."""
    if draw.flag(0.1):
        return shared_temperature(draw, batch.shape, dtype)
    if draw.flag(0.5):
        t = draw.choice((1.0, 0.7, 2.5))
        return t, torch.full(batch.shape, t, dtype=torch.float64)
    t = draw.uniform(batch.shape, 0.3, 2.3, draw.choice((torch.float32, torch.bfloat16, torch.float64)))
    if draw.flag(0.3):
        t = torch.where(~batch.live, draw.choice((0.0, NAN, INF, -1.0)), t).to(t.dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return draw.laid_out(t, keep=True), torch.where(batch.live, t.to(real).double(), 1.0)
