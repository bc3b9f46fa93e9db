"""Every registered op with arguments that are right, for tests that bend one of them: its layout, its length, its
dtype, where it lies.
"""

import functools

import torch
from reference import draw_rows, same_bits

from rlkernels import ops
from rlkernels.linear import token_stats

T, V, H = 6, 37, 8
REAL = torch.float32


def _drawn():
    x, targets, mask = draw_rows((T,), V)
    targets = targets.clamp(min=0)
    draw = torch.Generator().manual_seed(5)
    a, b, c, w = torch.rand(4, T, generator=draw) - 0.5
    w = w.abs() + 0.1
    rows = x, targets, w + 0.5, -100, mask, x.flip(-1).clone()
    grids = torch.randn(2, 3, 4, generator=draw)
    hidden, weight, bias = (
        torch.randn(T, H, generator=draw),
        torch.randn(V, H, generator=draw),
        torch.randn(V, generator=draw),
    )
    head = (
        hidden,
        weight,
        bias,
        targets,
        w + 0.5,
        torch.ones(V, dtype=torch.bool),
        ops.number(30.0),
        ops.number(0.9),
        -100,
        REAL,
        4,
        False,
        None,
        None,
        0,
        0,
        0,
        "linear_token_stats",
    )
    return a, b, c, w, rows, grids, head


@functools.cache
def _saved(backend):
    """What the backward passes of rows and of a head need of their forwards.

    Computed once: a launch of CUDA on the host takes 10 ms.
    """
    *_, rows, _, head = _drawn()
    per_row, found = (
        ops.token_stats_op(*rows, ops.ENTROPY | ops.KL, False, backend),
        token_stats.linear_stats(*head, ops.ENTROPY, backend),
    )
    return [per_row[k] for k in (1, 2, 3, 8, 9, 10)], found[1:4]


def _likeliest():
    known, ids = torch.randn(T, V, generator=torch.Generator().manual_seed(7)).log_softmax(-1).topk(3)
    return ids.int(), known


def op_calls(backend):
    """Name to ``(op, arguments)``, as the registered ops take them: numbers are tensors.

    Drawn anew each time: some ops write.
    """
    a, b, c, w, rows, (grid, values), head = _drawn()
    x, targets, _, _, mask, _ = rows
    saved, found = ([x.clone() for x in part] for part in _saved(backend))
    one, numbers = ops.number(1.0), ops.numbers
    return {
        "token_stats": (ops.token_stats_op, (*rows, 31, False, backend)),
        "token_stats_backward": (ops.token_stats_backward, (a, b, c, *rows, *saved, backend)),
        "token_stats_backward_": (ops.token_stats_backward_, (a, b, c, *rows, *saved, backend)),
        "token_stats_backward_into": (
            ops.token_stats_backward_into,
            (a, b, c, *rows, *saved, backend, torch.ones(T, V), torch.tensor(0.5)),
        ),
        "fused_policy": (
            ops.fused_policy_op,
            (
                "ppo_clip",
                x,
                targets,
                w + 0.5,
                -100,
                mask,
                [a, b],
                numbers((0.2, 0.28)),
                w,
                w.flip(0),
                "k3",
                c,
                w * 0.5,
                True,
                False,
                backend,
            ),
        ),
        "divergence": (ops.divergence_op, (*rows, None, None, "jsd", one * 0.3, w, True, backend)),
        "divergence of top log-probabilities": (
            ops.divergence_op,
            (*rows[:4], None, None, *_likeliest(), "forward_kl", one * 0.5, w, True, backend),
        ),
        "divergence_backward": (ops.divergence_backward, (*rows, None, None, "reverse_kl", one * 0.5, a, backend)),
        "divergence_backward_into": (
            ops.divergence_backward_into,
            (*rows, None, None, "forward_kl", one * 0.5, a, backend, torch.ones(T, V), torch.tensor(0.5)),
        ),
        "elementwise": (ops.elementwise, ("ppo_clip", a, [b, c], numbers((0.2, 0.28)), w, backend)),
        "elementwise of a grid": (ops.elementwise, ("k2", grid, [values], numbers(()), None, backend)),
        "elementwise_backward": (ops.elementwise_backward, (torch.tensor(0.3), values, grid, values.abs(), grid * 2)),
        "weighted_loss": (
            ops.weighted_loss,
            ("dpo_sigmoid", a, b, c, [], numbers((0.2, 0.1)), w > 0.3, torch.tensor(4), one, backend),
        ),
        "weighted_loss of columns": (
            ops.weighted_loss,
            ("value_clip", grid, None, None, [values, grid.flip(0)], numbers((0.2,)), values.abs(), None, one, backend),
        ),
        "weighted_loss_backward": (
            ops.weighted_loss_backward,
            (torch.tensor(0.3), torch.stack([grid, values]), grid, values, None),
        ),
        "gae": (ops.gae, (grid, values, grid > -1, None, one * 0.9, one * 0.95, "skip", backend)),
        "gae of packed": (
            ops.gae,
            (a, b, c > -0.3, torch.tensor([0, 2, 2, T]), one * 0.9, one * 0.95, "zero", backend),
        ),
        "linear_stats": (token_stats.linear_stats, (*head, ops.ENTROPY, backend)),
        "linear_stats_backward": (token_stats.linear_stats_backward, (a, b, *head, *found, True, True, True, backend)),
    }


NAMES = tuple(op_calls("eager"))


def places(arguments):
    """Where the tensors are: ``(place,)``, or ``(place, place in a list)``."""
    for k, x in enumerate(arguments):
        if isinstance(x, torch.Tensor):
            yield (k,)
        elif isinstance(x, list):
            yield from ((k, i) for i in range(len(x)))


def at(arguments, place):
    return arguments[place[0]] if len(place) == 1 else arguments[place[0]][place[1]]


def put(arguments, place, x):
    """The arguments with another tensor in that place."""
    changed = list(arguments)
    changed[place[0]] = x if len(place) == 1 else [x if i == place[1] else y for i, y in enumerate(arguments[place[0]])]
    return changed


def results(call, arguments):
    """What the op returns, or the tensor that it writes."""
    found = call(*arguments)
    if found is None:
        return [
            arguments[-2] if arguments[-1] is not None and isinstance(arguments[-1], torch.Tensor) else arguments[3]
        ]
    return [found] if isinstance(found, torch.Tensor) else list(found)


def negated(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def apart(x):
    """The same values with a hole behind each element, and NaN (or True, or a large number) in it."""
    if x.dim() == 0:
        return x
    filler = (
        torch.full_like(x, float("nan"))
        if x.dtype.is_floating_point
        else ~x
        if x.dtype == torch.bool
        else torch.full_like(x, 2**30)
    )
    return torch.stack([x, filler], -1).flatten(-2)[..., ::2]


def turned(x):
    return x if x.dim() < 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


def spread(x):
    """One element for all: what ``expand`` of a number gives. Offsets stay: they would be none."""
    if x.numel() < 2 or x.dtype == torch.int64 and x[0] != x[-1] and (x.diff() >= 0).all():
        return x
    return x.flatten()[:1].view((1,) * x.dim()).expand(x.shape)


LAYOUTS = {
    "apart": apart,
    "turned": turned,
    "spread": spread,
    "negated": lambda x: negated(x) if x.dtype == torch.float32 else x,
}


def check_layout(name, layout, backend):
    """Every tensor of an op in a layout, one after the other, gives the bits of its contiguous copy, and contiguous
    results.
    """
    for place in places(op_calls(backend)[name][1]):
        last = len(op_calls(backend)[name][1]) - 2
        written = name in ("token_stats_backward_", "token_stats_backward_into", "divergence_backward_into")
        written = written and place[0] == (3 if name.endswith("_") else last)
        if layout == "spread" and (written or "stats_backward" in name and place[0] in range(9, 15)):
            continue  # memory that overlaps is refused; a maximum that is not the row's is no statistic
        op = op_calls(backend)[name][0]
        for call in (op, op.op):
            arguments = op_calls(backend)[name][1]
            bent = LAYOUTS[layout](at(arguments, place))
            plain = bent.clone(memory_format=torch.contiguous_format).resolve_neg()
            got, want = (
                results(call, put(arguments, place, bent)),
                results(call, put(op_calls(backend)[name][1], place, plain)),
            )
            for k, (a, b) in enumerate(zip(got, want, strict=True)):
                assert same_bits(a.detach(), b.detach()), (name, layout, place, k)
                assert written or a.is_contiguous(), (name, layout, place, k)
