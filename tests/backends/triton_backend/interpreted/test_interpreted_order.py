"""Results do not depend on the order of programs, and no row is written or read by two of them."""

import pytest
import torch
from flat_backend import Flat
from problems import EVERYTHING, policy_problem
from reference import cotangents, draw_rows, same_bits

from rlkernels.backends.triton import launch as kernels
from rlkernels.backends.triton import launch_configs

ORDERS = ("forward", "reverse", 1, 2)


def rows_forward_and_backward():
    x, targets, mask = draw_rows((5,), 69, torch.bfloat16)
    stats = Flat(kernels).token_stats(x, targets, 0.7, -100, mask, x.flip(0), EVERYTHING)
    _, shift, total, entropy, _, _, _, _, ref_shift, ref_total, kl = stats
    saved = (shift, total, entropy, ref_shift, ref_total, kl)
    g = cotangents((5,), 3)
    reference = x.flip(0)
    return (
        *stats,
        Flat(kernels).token_stats_backward(*g, x, targets, 0.7, -100, mask, reference, *saved, None),
        Flat(kernels).token_stats_backward(*g, x, targets, 0.7, -100, mask, reference, *saved, x),
    )


def policy():
    x, targets, mask, c = policy_problem(101, torch.bfloat16)
    return Flat(kernels).fused_policy(
        "ppo_clip",
        x,
        targets,
        0.7,
        -100,
        mask,
        [c["old_logp"], c["advantage"]],
        [0.2, 0.28],
        c["weight"],
        c["entropy_weight"],
        "k3",
        c["ref_logp"],
        c["kl_weight"],
        True,
        None,
    )


def blocks():
    margin = torch.randn(100, generator=torch.Generator().manual_seed(0))
    return kernels.elementwise("pairwise", [margin], [], margin.abs())


def scan():
    rewards, values = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    return kernels.gae(rewards, values, rewards > -0.5, None, 0.99, 0.95, "skip")


@pytest.mark.fault(52)
@pytest.mark.parametrize("problem", [rows_forward_and_backward, policy, blocks, scan], ids=lambda f: f.__name__)
def test_four_program_orders_give_the_same_bits(problem, small_tiles, interpreter, monkeypatch):
    monkeypatch.setattr(launch_configs, "BLOCK", 16)
    monkeypatch.setattr(launch_configs, "SCAN", 16)
    results = []
    for order in ORDERS:
        with interpreter.configure(order=order):
            results.append(problem())
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.fault(101)
def test_the_checks_are_on(interpreter):
    options = interpreter.OPTIONS
    assert options.debug and options.bounds and options.races and options.strict_sum and options.poison


@pytest.mark.fault(1)
def test_offsets_beyond_32_bits_reach_the_right_row(small_tiles):
    vocab, far = 37, 2**30
    x, targets, mask = draw_rows((3,), vocab, torch.bfloat16, seed=1)
    (g,) = cotangents((3,), 1)

    def run(x, mask, targets, out):
        stats = Flat(kernels).token_stats(x, targets, 0.7, -100, mask, None, 15)
        return *stats[:7], Flat(kernels).token_stats_backward(
            g, g, None, x, targets, 0.7, -100, mask, None, *stats[1:4], None, None, None, out
        )

    expected = run(x, mask, targets, None)

    def apart(like, columns):  # only the pages of the three rows become resident
        storage = torch.UntypedStorage((2 * far + columns) * like.element_size())
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, (3, columns), (far, 1)).copy_(like.view(3, columns))

    sparse = apart(x, vocab)
    got = run(sparse, apart(mask, vocab), targets, sparse)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
