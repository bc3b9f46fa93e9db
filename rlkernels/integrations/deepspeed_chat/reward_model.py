"""The reward model of DeepSpeed-Chat with our loss: the transformer, the head and their arguments stay its own.

Both methods let DeepSpeed-Chat's ``forward_value`` make the score of every token. So hooks, adapters and sharded
weights work as they did, and no glue of its ``forward`` stands here a second time.
"""

import functools
from collections.abc import Callable
from typing import Any

from rlkernels.integrations.deepspeed_chat import functions

VALUE_ONLY = {"return_value_only": True}


def forward(
    value: Callable[..., Any],
    model: Any,
    input_ids: Any = None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
    use_cache: bool = False,
) -> dict[str, Any]:
    """Computes what ``RewardModel.forward`` returns, from the scores that ``value``, its ``forward_value``, makes.

    ``position_ids`` does not reach the transformer, because it does not in DeepSpeed-Chat either.
    """
    rewards = value(
        input_ids,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        head_mask=head_mask,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **VALUE_ONLY,
    )
    return functions.pairwise_divergence_loss(
        rewards, input_ids, model.PAD_ID, model.num_padding_at_beginning, model.compute_fp32_loss
    )


def forward_value(
    value: Callable[..., Any],
    model: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
    return_value_only: bool = False,
    prompt_length: int = 0,
    use_cache: bool = False,
) -> Any:
    """Computes what ``RewardModel.forward_value`` returns: the scores of all tokens, and of each answer's last one."""
    values = value(
        input_ids,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        head_mask=head_mask,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **VALUE_ONLY,
    )
    if return_value_only:
        return values
    ends = functions.answer_end_scores(values, input_ids, model.PAD_ID, prompt_length)
    return {"values": values, "chosen_end_scores": ends}


@functools.cache
def subclass(base: type) -> type:
    """Returns the subclass of DeepSpeed-Chat's ``RewardModel`` whose methods are ours."""

    class RLKRewardModel(base):
        """A reward model of DeepSpeed-Chat whose loss is one launch, without a host synchronisation per pair."""

        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            """Computes the loss of the pairs and the scores at the ends of the answers."""
            return forward(super().forward_value, self, *args, **kwargs)

        def forward_value(self, *args: Any, **kwargs: Any) -> Any:
            """Computes the scores of all tokens, and of each answer's last one."""
            return forward_value(super().forward_value, self, *args, **kwargs)

    # Where pickle finds it.
    RLKRewardModel.__module__, RLKRewardModel.__qualname__ = "rlkernels.integrations.deepspeed_chat", "RLKRewardModel"
    return RLKRewardModel
