"""The kernel that the package ``kernels`` loads: rlkernels, which must be installed, under the names of the Hub."""

from rlkernels.integrations.hub import layers, selective_log_softmax_and_entropy

__all__ = ["layers", "selective_log_softmax_and_entropy"]
