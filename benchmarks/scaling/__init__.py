"""The growth of time with tokens and vocabulary: a fit of measurements, and a model of what is not measured."""
