"""Models of transformers under our losses: from any ``*ForCausalLM`` to log-probabilities and losses without logits.

* ``hidden_and_head(model, **batch)``: the arguments of every ``linear_*`` function, to be spread.
* ``token_logprobs(model, input_ids, attention_mask)``: shifted log-probabilities.
* ``attach(model)``: the model's own loss without logits, under ``Trainer`` or any loop; ``detach`` undoes it.
* ``compute_loss_func``: the argument of ``Trainer`` of that name, for another supervised loss.
* ``RewardModel``: a base model with a head of rewards or values.

Names, wrappers and conventions are here; the losses are those of ``rlkernels``.
"""

from rlkernels.integrations.transformers.causal_lm import hidden_and_head, token_logprobs
from rlkernels.integrations.transformers.deferred_logits import DeferredLogits, HeadInputs
from rlkernels.integrations.transformers.reward_model import RewardModel
from rlkernels.integrations.transformers.trainer import attach, compute_loss_func, detach

__all__ = [
    "DeferredLogits",
    "HeadInputs",
    "RewardModel",
    "attach",
    "compute_loss_func",
    "detach",
    "hidden_and_head",
    "token_logprobs",
]
