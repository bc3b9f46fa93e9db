"""The speed of a GPU as compiled code tells it, before that has run on one. Every figure of it is a model."""
