"""The exact KL from a reference's head, as a term of a loss from hidden states."""

import torch

from rlkernels import checks
from rlkernels.linear.distillation_loss import linear_distillation_loss


def check_reference_head(caller, hidden, ref_hidden, ref_weight, ref_bias):
    """Refuses a reference's hidden states and head that do not match the policy's hidden states."""
    if ref_weight is None:
        raise ValueError(f"{caller}: ref_hidden came without ref_weight; pass both")
    checks.floating(caller, "ref_hidden", ref_hidden)
    checks.head(caller, ref_hidden, ref_weight, ref_bias, "ref_", hidden)
    checks.no_gradient(caller, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)


def kl_of_reference(hidden, weight, reference, options, kind, weights, coefficient, apart):
    """Returns ``coefficient`` times the weighted sum of exact KLs, or its terms, and the mean KL of the tokens.

    Args:
        reference: hidden states, weight and bias of its head. options: HeadOptions of the policy's head.
        weights: ``[...]``, not negative; a token of weight 0 takes no part. coefficient: None for the mean alone.
        apart: nothing is summed.
    """
    ref_hidden, ref_weight, ref_bias = reference
    # Without ignore_index, because the weights tell which rows take part.
    options = {name: x for name, x in options.items() if name != "ignore_index"}
    how = {"mask": weights != 0, "reduction": "none"} if apart else {"weights": weights}
    if coefficient is not None and not apart:
        how["weights"] = weights * coefficient
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and coefficient is not None):
            loss, metrics = linear_distillation_loss(
                hidden,
                weight,
                ref_hidden,
                ref_weight,
                teacher_bias=ref_bias,
                teacher_softcap=options["softcap"],
                teacher_logit_scale=options["logit_scale"],
                kind=kind,
                return_metrics=True,
                **how,
                **options,
            )
    except checks.NAMED as error:
        if type(error) not in checks.NAMED:
            raise
        raise checks.named(error, "linear_distillation_loss") from error
    if apart and coefficient is not None:
        loss = loss * (weights * coefficient)
    return loss, metrics["divergence"]
