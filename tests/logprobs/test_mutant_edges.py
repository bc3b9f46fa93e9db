"""Cases that nothing but a planted mistake asked for (``python tests/repository/mutation``): each names what it would
let through.
"""

import pytest
import torch
from reference import draw_rows

import rlkernels as rlk


@pytest.mark.fault(16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True], ids=["-inf", "vocab_mask"])
def test_a_row_without_a_finite_logit_has_no_logsumexp(masked, dtype, backend):
    """A sum of 0 in place of NaN would make it 0, which is what an ignored row gets."""
    x, targets, _ = draw_rows((3,), 37, dtype)
    mask = torch.ones(3, 37, dtype=torch.bool)
    if masked:
        mask[1] = False
    else:
        x[1] = -torch.inf
    stats = rlk.token_stats(x, targets.clamp(min=0), vocab_mask=mask)
    assert stats.logsumexp[1].isnan() and stats.logprobs[1].isnan() and stats.logsumexp[[0, 2]].isfinite().all()


@pytest.mark.fault(20)
@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_gradient_halfway_between_two_numbers_is_rounded_to_the_even_one(dtype, digits, backend):
    """p = 1/256 exactly, and an upstream gradient with one bit more than the dtype holds: half up would
    be one ulp off.
    """
    x = torch.zeros(2, 256, dtype=dtype, requires_grad=True)
    below, above = 1 + 2.0**-digits, 1 + 3 * 2.0**-digits  # the even neighbours are 1, below, and 1 + 4 units, above
    logp = rlk.token_logprobs(x, torch.tensor([3, 3]))
    (gradient,) = torch.autograd.grad(logp, x, torch.tensor([below, above]))
    expected = torch.tensor([1.0, 1 + 4 * 2.0**-digits]) / -256
    assert torch.equal(gradient[:, 0].float(), expected) and torch.equal(gradient[:, 255].float(), expected)


@pytest.mark.parametrize("total", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize(
    "mode, name", [("global-token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "num_sequences")]
)
def test_a_global_count_of_zero_gives_live_tokens_the_weight_zero(mode, name, total):
    """On a rank whose own tokens live although the total that it was told is 0: 1 / 0 would be inf."""
    assert not rlk.token_weights(torch.ones(2, 3), mode, **{name: total}).any()


@pytest.mark.parametrize(
    "mode, name", [("global-token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "num_sequences")]
)
def test_a_count_of_zero_that_no_host_reads_gives_live_tokens_the_weight_zero(mode, name):
    weights = torch.compile(rlk.token_weights, backend="eager", fullgraph=True)
    assert not weights(torch.ones(2, 3), mode, **{name: torch.tensor(0)}).any()


def test_a_row_without_weight_has_no_gradient_whatever_its_divergence(backend):
    x, y = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(2))
    x[1, 4] = torch.nan
    for kind in ("forward_kl", "reverse_kl", "jsd", "cross_entropy"):
        leaf = x.clone().requires_grad_()
        value = rlk.token_divergences(leaf, y, kind=kind)
        (gradient,) = torch.autograd.grad(value, leaf, torch.tensor([1.0, 0.0, 2.0]))
        assert value[1].isnan() and (gradient[1] == 0).all() and gradient[[0, 2]].any(-1).all()
