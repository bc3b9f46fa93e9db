"""Losses from logits and from log-probabilities; the same from hidden states is in ``rlkernels.linear``."""
