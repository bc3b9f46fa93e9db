"""How time grows with tokens and vocabulary: a fit of measurements, and a model of what has not been measured."""
