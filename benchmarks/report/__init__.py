"""Tables, targets, JSON and pictures of a run."""
