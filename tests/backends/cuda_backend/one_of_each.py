"""Every kernel in every variant on small awkward rows; prints one hash per call.

As a program, so that a sanitizer can be loaded before Python.

    python one_of_each.py <module> <order>
"""

import hashlib
import math
import sys

import torch
from flat_backend import Flat


def rows(shape, vocab, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, vocab, generator=generator) * 4
    x[..., : vocab // 3][0] = -math.inf
    targets = torch.randint(vocab, shape, generator=generator).view(-1)
    targets[-1] = -100
    mask = torch.rand(targets.numel(), vocab, generator=generator) < 0.8
    return x.to(dtype), targets, mask


def calls(backend, choose):
    """Yields ``(name, outputs)``.

    Rows end where their storage ends, so that a read behind one is a read outside of it.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab, shape in ((1, (2,)), (13, (1, 3)), (1033, (3,)), (8199, (2,))):
            what = f"{str(dtype)[6:]} V={vocab}"
            x, targets, mask = rows(shape, vocab, dtype, vocab)
            ref = x.roll(1, -1).clone()
            count = targets.numel()
            temperature = 0.5 + torch.rand(count, generator=torch.Generator().manual_seed(2))
            g = torch.randn(3, count, generator=torch.Generator().manual_seed(3))
            for wanted, other, kept in (
                (0, None, None),
                (1, None, mask),
                (15, None, None),
                (17, ref, None),
                (31, ref, mask),
            ):
                stats = Flat(backend).token_stats(x, targets, temperature, -100, kept, other, wanted)
                yield f"token_stats {what} wanted={wanted}", stats
            _, shift, total, entropy, _, _, _, _, ref_shift, ref_total, kl = stats
            saved = (shift, total, entropy, ref_shift, ref_total, kl)
            yield (
                f"backward {what}",
                [Flat(backend).token_stats_backward(*g, x, targets, temperature, -100, mask, ref, *saved, None)],
            )
            yield (
                f"backward {what} without reference",
                [Flat(backend).token_stats_backward(*g[:2], None, x, targets, 0.7, -100, None, None, *saved, None)],
            )
            if dtype == torch.float32:
                for narrow in (torch.bfloat16, torch.float16):
                    out = torch.empty(count, vocab, dtype=narrow)
                    yield (
                        f"backward {what} to {narrow}",
                        [
                            Flat(backend).token_stats_backward(
                                *g[:2], None, x, targets, 0.7, -100, None, None, *saved, out
                            )
                        ],
                    )
            old, weight = g[0].abs().neg(), g[1].abs()
            for team in (-1, 1, 2, 4, 8):
                choose(team)
                args = (
                    "ppo_clip",
                    x,
                    targets,
                    0.7,
                    -100,
                    mask,
                    [old, g[2]],
                    [0.2, 0.28],
                    weight,
                    weight,
                    "k3",
                    old,
                    weight,
                    True,
                )
                yield f"fused_policy {what} team={team}", Flat(backend).fused_policy(*args, None)
                yield f"fused_policy {what} team={team} in place", Flat(backend).fused_policy(*args, x.clone())
                if dtype == torch.float32:  # of a head: the gradient in the dtype of its products
                    for narrow in (torch.bfloat16, torch.float16):
                        yield (
                            f"fused_policy {what} team={team} to {narrow}",
                            Flat(backend).fused_policy(*args, torch.empty(count, vocab, dtype=narrow)),
                        )
            choose(0)
    for n in (1, 1023, 3000):
        columns = list(torch.randn(3, n, generator=torch.Generator().manual_seed(n)))
        yield f"elementwise n={n}", backend.elementwise("dual_clip", columns, [0.2, 0.28, 3.0], columns[0].abs())
        yield f"elementwise n={n} fp64", backend.elementwise("value_clip", [c.double() for c in columns], [0.2], None)
        live = columns[1] > -1
        yield (
            f"weighted_loss n={n}",
            backend.weighted_loss("pairwise", columns[0], columns[1:], [], [], live, live.sum(), 0.5),
        )
        yield (
            f"weighted_loss n={n} fp64",
            backend.weighted_loss(
                "k2", columns[0].double(), [], [columns[1].double()], [], columns[2].double(), None, 0.5
            ),
        )
    rewards, values = torch.randn(2, 2, 2500, generator=torch.Generator().manual_seed(4))
    alive = rewards > -0.5
    for masked in ("skip", "zero", "none"):
        yield f"gae {masked}", backend.gae(rewards, values, alive, None, 0.99, 0.95, masked)
    bounds = torch.tensor([0, 3, 3, 2500])
    yield (
        "gae packed fp64",
        backend.gae(rewards[0].double(), values[0].double(), alive[0].clone(), bounds, 0.99, 0.95, "skip"),
    )


def hashes(backend, choose):
    return {
        name: hashlib.sha256(
            b"".join(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in outputs)
        ).hexdigest()[:16]
        for name, outputs in calls(backend, choose)
    }


if __name__ == "__main__":
    import host_build

    from rlkernels.backends import cuda

    module, set_order = host_build.load(sys.argv[1])
    set_order(sys.argv[2])
    host_build.install(cuda, module)
    for name, value in hashes(cuda, module.choose).items():
        print(value, name)
