"""The attached models, and the count of losses that were computed without logits, as ``rlkernels.status()`` shows."""

import weakref

from torch import nn

from rlkernels.integrations import _patching

models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class _Models(_patching.Host):
    """The library in ``rlkernels.status()``: instances of models are attached, no module is patched."""

    def status(self) -> _patching.PatchStatus:
        names = tuple(sorted(type(model).__name__ for model in models))
        return _patching.PatchStatus(names, dict(self.calls), dict(self.delegations), self.title)


host = _patching.register(_Models("transformers", "transformers", title="transformers"))
