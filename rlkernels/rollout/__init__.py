"""The mismatch of the rollout engine and the trainer: weights, masks and metrics."""
