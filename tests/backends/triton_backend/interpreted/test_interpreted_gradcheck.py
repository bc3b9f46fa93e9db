"""Gradients of the fp64 path by finite differences, through the public functions."""

import pytest
import torch
from reference import cotangents, draw_rows

import rlkernels as rlk
from rlkernels.backends.triton import launch_configs
from rlkernels.backends.triton.launch_configs import Config

FUNCTIONS = {
    "everything": lambda x, y, m, r, g: (lambda s: s.logprobs * g[0] + s.entropy * g[1] + s.kl * g[2])(
        rlk.token_stats(x, y, ref_logits=r, kl="exact", temperature=0.7, vocab_mask=m)
    ),
    "temperature per row": lambda x, y, m, r, g: (lambda s: s.logprobs * g[0] + s.entropy * g[1])(
        rlk.token_stats(x, y, temperature=g[2].abs() + 0.5)
    ),
    "policy": lambda x, y, m, r, g: (
        1.7
        * rlk.logits_policy_loss(
            x,
            y,
            g[0] - 2,
            g[1],
            objective="sapo",
            temperature=0.7,
            vocab_mask=m,
            ref_logprobs=g[0] - 2.2,
            kl_coef=0.3,
            entropy_coef=0.1,
        )
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_of_the_fp64_path(name, backend):
    with launch_configs.override(
        token_stats=Config(1, 32), token_stats_backward=Config(1, 32), fused_policy=Config(1, 32)
    ):
        x, targets, mask = draw_rows((2,), 11, torch.float64)
        g = cotangents((3, 2), 1, dtype=torch.float64)[0] + 0.3
        reference = draw_rows((2,), 11, torch.float64, seed=2)[0].clamp(-5, 5)
        leaf = x.clamp(-5, 5).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: FUNCTIONS[name](x, targets, mask, reference, g), leaf, eps=1e-6, atol=1e-7, rtol=1e-6
        )
