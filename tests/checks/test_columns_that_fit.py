"""The one question that stands for four checks of a column: what it lets through, they let through, too."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from rlkernels import checks
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.token_weights import live_mask

LIKE = torch.zeros(2, 3, requires_grad=True)


class Named(torch.Tensor):
    """A subclass that adds nothing."""


REFUSED = {
    "none": lambda: None,
    "a number": lambda: 1.0,
    "a list": lambda: [[0.0] * 3] * 2,
    "another dtype": lambda: torch.zeros(2, 3, dtype=torch.int64),
    "another shape": lambda: torch.zeros(3, 2),
    "one dimension more": lambda: torch.zeros(1, 2, 3),
    "on another device": lambda: torch.zeros(2, 3, device="meta"),
    "with a gradient": lambda: torch.zeros(2, 3, requires_grad=True),
    "sparse": lambda: torch.zeros(2, 3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)], layout=torch.jagged),
    "of oneDNN's layout": lambda: torch.zeros(2, 3).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.qint8),
}
TAKEN = {
    "plain": lambda: torch.ones(2, 3),
    "turned": lambda: torch.ones(3, 2).t(),
    "expanded": lambda: torch.ones(2, 1).expand(2, 3),
    "a view with a negation": lambda: torch.imag(torch.zeros(2, 3, dtype=torch.complex64).conj()),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_check_refuses_does_not_fit(kind):
    x = REFUSED[kind]()
    assert not checks.fits(x, LIKE, LIKE.dtype)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="policy_loss: (logprobs and )?old_logprobs"):
        column("policy_loss", "old_logprobs", x, LIKE)


@pytest.mark.parametrize("kind", TAKEN)
def test_a_plain_column_fits_and_comes_back_itself(kind):
    x = TAKEN[kind]()
    assert checks.fits(x, LIKE, LIKE.dtype) and column("policy_loss", "old_logprobs", x, LIKE) is x


def test_a_column_with_a_tangent_does_not_fit():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.zeros(2, 3), torch.ones(2, 3))
        assert not checks.fits(x, LIKE, LIKE.dtype)
        with pytest.raises(RuntimeError, match="policy_loss: forward-mode AD"):
            column("policy_loss", "old_logprobs", x, LIKE)


def test_a_subclass_goes_to_the_checks_and_passes():
    x = torch.zeros(2, 3).as_subclass(Named)
    assert not checks.fits(x, LIKE, LIKE.dtype) and column("policy_loss", "old_logprobs", x, LIKE) is x


def test_a_mask_of_one_dtype_fits_and_the_others_are_converted():
    mask = torch.tensor([[True, False, True]] * 2)
    assert live_mask("policy_loss", LIKE, mask) is mask
    turned = live_mask("policy_loss", LIKE, mask.t().contiguous().t())
    assert turned.is_contiguous() and turned.equal(mask)
    assert live_mask("policy_loss", LIKE, mask.long()).equal(mask)
    with pytest.raises(ValueError, match="policy_loss: mask has shape"):
        live_mask("policy_loss", LIKE, mask[:1])
    with pytest.raises(RuntimeError, match="must be on one device"):
        live_mask("policy_loss", LIKE, mask.to("meta"))
