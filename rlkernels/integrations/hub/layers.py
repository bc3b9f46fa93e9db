"""The functions as stateless modules, whose ``forward`` the package ``kernels`` puts into a model."""

from typing import Any

from torch import Tensor, nn

from rlkernels.integrations import hub


class selective_log_softmax_and_entropy(nn.Module):  # noqa: N801, because kernels finds it by the function's name
    """A module of ``selective_log_softmax_and_entropy``."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, logits: Tensor, index: Tensor, temperature: Any = 1.0, row_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Calls the function of that name."""
        return hub.selective_log_softmax_and_entropy(logits, index, temperature, row_mask)
