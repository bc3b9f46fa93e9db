"""Batches packed and unpacked, and targets, each against a loop over rows."""

import torch

from fuzz.batches import Batch
from fuzz.draws import leaf, wide
from fuzz.trial import case


def padded(draw):
    """``(mask, rows of live places)`` of a padded batch."""
    live = draw.coins((draw.choice((1, 2, 4)), draw.choice((0, 1, 3, 6))), draw.choice((0.0, 0.4, 0.8, 1.0)))
    return live, [[t for t, there in enumerate(row) if there] for row in live.tolist()]


def numbers(trial, shape):
    return leaf(trial.draw.laid_out(trial.draw.normal(shape, trial.draw.choice((torch.float32, *trial.draw.floats)))))


def compare(trial, what, got, truth, x, of):
    trial.expect(what, got, truth, 0.0)
    g = trial.draw.normal(truth.shape, got.dtype)
    (found,) = trial.gradients([got], [x], [g])
    (want,) = torch.autograd.grad(truth, of, g.double(), allow_unused=True)
    trial.expect(f"gradient of {what}", found, torch.zeros_like(of) if want is None else want, 0.0)


@case("valid")
def pack(trial):
    draw = trial.draw
    live, places = padded(draw)
    x, ids = numbers(trial, live.shape), draw.integers(0, 99, live.shape)
    count = sum(map(len, places))
    pad_to = draw.choice((1, 3, 8))
    bound = draw.choice((None, count + 5, count)) or None
    fill = draw.choice((None, {"x": 1.5}, {"x": 1.5, "ids": -100})) or {}
    got = trial.call(
        "pack",
        {"x": x, "ids": draw.laid_out(ids, keep=True)},
        draw.masked(live),
        pad_to=pad_to,
        num_tokens=bound,
        fill=fill,
    )
    size = -(-(count if bound is None else bound) // pad_to) * pad_to
    of = wide(x)
    index = torch.tensor([i * live.shape[1] + t for i, row in enumerate(places) for t in row], dtype=torch.long)
    tail = size - count
    truth = torch.cat([of.flatten()[index], torch.full((tail,), fill.get("x", 0.0), dtype=torch.float64)])
    compare(trial, "packed numbers", got.tensors["x"], truth, x, of)
    ends = torch.tensor([0, *(sum(map(len, places[: i + 1])) for i in range(len(places)))])
    ends[-1] = size
    trial.expect("offsets", got.cu_seqlens, ends, 0.0)
    known = torch.cat([ids.flatten()[index], torch.full((tail,), fill.get("ids", 0))])
    trial.expect("packed ids", got.tensors["ids"], known, 0.0)
    trial.expect("padding", got.attention_mask, torch.arange(size) < count, 0.0)


@case("valid")
def unpack(trial):
    draw = trial.draw
    live, places = padded(draw)
    lengths = [len(row) for row in places]
    x = numbers(trial, (sum(lengths),))
    cu = draw.laid_out(torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)]), keep=True)
    value = draw.choice((None, -2.5))
    fill = None if value is None else {"x": value}
    of = wide(x)
    if draw.flag(0.4):
        got = trial.call("unpack", {"x": x}, cu, draw.masked(live), fill=fill)["x"]
    else:
        length = draw.choice((None, max(lengths) + 1))
        padding = draw.choice(("right", "left"))
        got = trial.call("unpack", {"x": x}, cu, length=length, padding=padding, fill=fill)["x"]
        size = max(lengths) if length is None else length
        places = [list(range(n)) if padding == "right" else list(range(size - n, size)) for n in lengths]
        live = torch.zeros((len(places), size), dtype=torch.bool)
    index = [torch.tensor(row, dtype=torch.long) for row in places]
    parts = of.split(lengths)
    rows = [
        torch.full((live.shape[1],), value or 0.0, dtype=torch.float64).index_put((i,), part)
        for i, part in zip(index, parts, strict=True)
    ]
    compare(trial, "rows", got, torch.stack(rows), x, of)


@case("valid")
def shift_targets(trial):
    draw = trial.draw
    batch = Batch(draw)
    ids = draw.integers(0, 99, batch.shape, draw.choice((torch.int32, torch.int64)))
    trained = draw.coins(batch.shape, 0.7) if draw.flag(0.5) else None
    ignored = draw.choice((-100, 3, 2**40))
    got = trial.call(
        "shift_targets",
        draw.laid_out(ids, keep=True),
        batch.offsets,
        attention_mask=batch.mask,
        mask=None if trained is None else draw.masked(trained),
        ignore_index=ignored,
    )
    tokens, live, whose = ids.flatten().tolist(), batch.live.flatten().tolist(), batch.sequence.tolist()
    kept = [True] * len(tokens) if trained is None else trained.flatten().tolist()
    truth = [
        tokens[t + 1]
        if t + 1 < len(tokens) and whose[t] == whose[t + 1] and live[t] and live[t + 1] and kept[t + 1]
        else ignored
        for t in range(len(tokens))
    ]
    trial.expect("targets", got, torch.tensor(truth, dtype=torch.float64).view(batch.shape), 0.0)
