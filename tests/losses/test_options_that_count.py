"""Options that would have no effect are refused, and ranges belong to the objectives of the library alone."""

import pytest
import torch

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES

LOGP = -torch.rand(4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moved():
    """A user's objective, which the registry loses again."""

    @rlk.objective(columns=3)
    def moved(logp, old_logp, advantage, delta=-0.5, beta=0.0, clip_low=3.0):
        """``-(A + delta + beta + clip_low) logp``, whose parameters are of no library objective."""
        factor = advantage + delta + beta + clip_low
        return -factor * logp, -factor

    yield moved
    OBJECTIVES.pop("moved")


def test_a_users_parameters_may_have_any_value_and_the_librarys_may_not(moved):
    logp = LOGP.view(2, 2).clone().requires_grad_()
    loss = rlk.policy_loss(logp, logp.detach(), torch.ones(2, 2), objective=moved)
    torch.testing.assert_close(loss, -(3.5 * logp).mean())
    loss = rlk.policy_loss(logp, logp.detach(), torch.ones(2, 2), objective=moved, delta=-7.0, clip_low=-1.0)
    torch.testing.assert_close(loss, 7.0 * logp.mean())
    rlk.check_objective(moved)
    with pytest.raises(ValueError, match="policy_loss: clip_low must be in"):
        rlk.policy_loss(logp, logp.detach(), torch.ones(2, 2), objective="ppo_clip", clip_low=3.0)


@pytest.mark.parametrize("distance", [0.0, 1e-9, -1e-8, 5e-8, -5.9e-8, 1e-7, 1e-6, -1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_alpha_near_1_is_the_reverse_kl(distance, dtype, as_tensor):
    chosen = LOGP.to(dtype, copy=True).requires_grad_()
    arguments = chosen, 2 * LOGP.to(dtype), 3 * LOGP.to(dtype), LOGP.to(dtype)
    alpha = torch.tensor(1.0 + distance, dtype=torch.float64) if as_tensor else 1.0 + distance
    found = rlk.dpo_loss(*arguments, f_divergence="alpha_divergence", alpha=alpha)
    expected = rlk.dpo_loss(*arguments)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    gradients = [torch.autograd.grad(x, chosen)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=5e-6, atol=1e-8)


def test_a_divergence_of_a_loss_without_a_score_is_refused_and_its_mixture_is_not():
    with pytest.raises(ValueError, match="dpo_loss: loss_type 'sft' takes no f_divergence"):
        rlk.dpo_loss(
            LOGP, LOGP, LOGP, LOGP, loss_type="sft", chosen_lengths=torch.ones(4), f_divergence="js_divergence"
        )
    with pytest.raises(ValueError, match="dpo_loss: loss_type 'nca_pair' takes no f_divergence"):
        rlk.dpo_loss(LOGP, LOGP, LOGP, LOGP, loss_type=["nca_pair", "sigmoid"], f_divergence="js_divergence")
    mixed = {"loss_type": ["sigmoid", "sft"], "chosen_lengths": torch.ones(4)}
    plain, other = (
        rlk.dpo_loss(LOGP, 2 * LOGP, LOGP, LOGP, f_divergence=f, **mixed) for f in ("reverse_kl", "js_divergence")
    )
    assert plain != other


def test_a_length_of_the_prompt_without_ids_is_refused():
    with pytest.raises(ValueError, match="end_scores: prompt_length goes with input_ids and pad_id"):
        rlk.end_scores(torch.zeros(2, 3), torch.ones(2, 3), prompt_length=2)


@pytest.mark.parametrize("function", ["policy_loss", "value_loss"])
def test_a_mask_that_wants_a_gradient_is_refused(function):
    mask = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=f"{function}: mask gets no gradient; detach it"):
        getattr(rlk, function)(LOGP, LOGP, LOGP, mask)
