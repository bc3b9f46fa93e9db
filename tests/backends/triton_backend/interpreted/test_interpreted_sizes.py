"""Sizes that a vocabulary or a batch really has: many rows, padded vocabularies, vocabularies above 250,000; with the
tiles that are shipped.
"""

import pytest
import torch
from flat_backend import Flat
from problems import EVERYTHING, policy_problem
from reference import assert_within_policy, cotangents, same_bits, statistics
from test_logprobs_precision import test_large_vocabularies_stay_within_the_bounds  # noqa: F401  (here with the shipped tiles)

import rlkernels as rlk
from rlkernels.backends.triton import launch as kernels

MANY, CHOSEN = 70_000, (0, 1, 65_535, 65_536, 69_999)
PADDED = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.fault(13)
def test_seventy_thousand_rows_lie_on_the_first_axis_of_the_grid(small_tiles, interpreter):
    """The interpreter refuses a second or third axis beyond 65535.

    Five programs run; their rows have the bits that they have alone.
    """
    x = torch.randn(MANY, 37, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(MANY) % 37
    g = cotangents((MANY,), 3)
    rows = list(CHOSEN)

    def run(x, targets, g, programs):
        with interpreter.configure(programs=programs):
            stats = Flat(kernels).token_stats(x, targets, 0.7, -100, None, x.flip(-1), EVERYTHING)
            _, shift, total, entropy, _, _, _, _, ref_shift, ref_total, kl = stats
            gradient = Flat(kernels).token_stats_backward(
                *g, x, targets, 0.7, -100, None, x.flip(-1), shift, total, entropy, ref_shift, ref_total, kl, None
            )
            fused = Flat(kernels).fused_policy(
                "ppo_clip",
                x,
                targets,
                0.7,
                -100,
                None,
                [g[0], g[1]],
                [0.2, 0.2],
                g[2],
                g[0],
                None,
                None,
                None,
                True,
                None,
            )
            scanned = kernels.gae(x[:, :4].contiguous(), x[:, 4:8].contiguous(), None, None, 0.99, 0.95, "none")
        return *stats, gradient, *fused[1:], *scanned

    got = run(x, targets, g, CHOSEN)
    alone = run(x[rows], targets[rows], [v[rows] for v in g], None)
    assert all(same_bits(a[rows], b) for a, b in zip(got, alone, strict=True))
    truth, base = (statistics(x[rows], targets[rows], 0.7, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert_within_policy(got[0][rows], truth["logprobs"], base["logprobs"], "logprobs")


@pytest.mark.fault(6)
def test_vocab_mask_takes_padded_columns_out_and_without_it_they_count(backend):
    real, padded = 151_665, 151_936
    x = torch.randn(2, real, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wide = torch.nn.functional.pad(x, (0, padded - real), value=5.0)
    targets, mask = torch.tensor([0, real - 1]), torch.arange(padded) < real
    truth, base = statistics(x, targets), statistics(x.float(), targets, dtype=torch.float32)
    leaf = wide.clone().requires_grad_()
    got = rlk.token_stats(leaf, targets, vocab_mask=mask, outputs=PADDED)
    for name in ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits"):
        assert_within_policy(getattr(got, name), truth[name], base[name], name)
    (gradient,) = torch.autograd.grad(got.logprobs.sum() + got.entropy.sum(), leaf)
    assert not gradient[:, real:].any() and (gradient[:, :real] != 0).double().mean() > 0.99
    without = wide[:, :real]  # an odd vocabulary inside aligned rows: the same columns, no mask
    assert same_bits(rlk.token_logprobs(without, targets), got.logprobs)
    assert (rlk.token_logprobs(wide, targets) < truth["logprobs"] - 0.1).all()


@pytest.mark.fault(75)
def test_the_policy_loss_of_a_large_vocabulary_has_the_bits_of_the_two_kernels():
    x, targets, _, c = policy_problem(262_144, torch.bfloat16, rows=3)
    _, gradient, logp, shift, total, entropy, dlogp = Flat(kernels).fused_policy(
        "ppo_clip",
        x,
        targets,
        0.7,
        -100,
        None,
        [c["old_logp"], c["advantage"]],
        [0.2, 0.28],
        c["weight"] + 1,
        c["entropy_weight"] + 1,
        None,
        None,
        None,
        True,
        None,
    )
    stats = Flat(kernels).token_stats(x, targets, 0.7, -100, None, None, 1)
    assert all(same_bits(a, b) for a, b in zip((logp, shift, total, entropy), stats[:4], strict=True))
    again = Flat(kernels).token_stats_backward(
        dlogp,
        -c["entropy_weight"] - 1,
        None,
        x,
        targets,
        0.7,
        -100,
        None,
        None,
        shift,
        total,
        entropy,
        None,
        None,
        None,
        None,
    )
    assert same_bits(gradient, again)
