"""Statistics and losses from hidden states and an lm_head, without the ``[T, V]`` logits."""
