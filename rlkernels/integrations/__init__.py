"""Adapters for trainers. Each module speaks one trainer's names and units; none of them computes a loss.

Import the one you need: ``from rlkernels.integrations import trl``. Importing an adapter does not import its trainer.
``RLKERNELS_PATCH=trl,verl`` in the environment patches these when ``rlkernels`` is imported.
"""

import importlib
import os
import warnings

from rlkernels.integrations._patching import PatchReport, PatchStatus, status

HOSTS = ("trl", "verl", "openrlhf", "deepspeed_chat", "slime")

__all__ = ["PatchReport", "PatchStatus", "patch_from_environment", "status"]


def patch_from_environment() -> dict[str, PatchReport]:
    """Patches the trainers that ``RLKERNELS_PATCH`` names, such as ``trl,verl``; ``import rlkernels`` calls it.

    A trainer that is not installed, or whose version or signatures are unknown, is left as it is with a RuntimeWarning.
    Names: ``trl``, ``verl``, ``openrlhf``, ``deepspeed_chat``, ``slime``.

    Returns:
        the report of each trainer that was patched.

    Raises:
        ValueError: the variable names something else; nothing is patched.

    Example:
        >>> from rlkernels.integrations import patch_from_environment
        >>> patch_from_environment()  # the variable is not set
        {}
    """
    named = [name.strip() for name in os.environ.get("RLKERNELS_PATCH", "").split(",")]
    names = list(dict.fromkeys(name for name in named if name))
    unknown = [name for name in names if name not in HOSTS]
    if unknown:
        raise ValueError(f"RLKERNELS_PATCH names {unknown}; known are {list(HOSTS)}, separated by commas")
    reports = {}
    for name in names:
        try:
            reports[name] = importlib.import_module(f"rlkernels.integrations.{name}").patch()
        # Any exception, because the import of a trainer runs its code, and a process must not die of a patch.
        except Exception as error:
            message = f"RLKERNELS_PATCH={name} patched nothing: {type(error).__name__}: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    return reports
