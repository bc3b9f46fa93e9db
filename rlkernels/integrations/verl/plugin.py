"""The plugin that ``import verl`` loads: entry point ``rlkernels`` of the group ``verl.plugins``.

It adds the names ``rlk_*`` to verl's registries in every process, Ray's workers among them, and replaces nothing.
``RLKERNELS_PATCH=verl`` replaces verl's own functions, too. ``VERL_USE_EXTERNAL_PLUGINS=none`` leaves it out.
"""

import warnings

from rlkernels.integrations import verl as integration


def activate() -> bool:
    """Registers the names; where that fails it warns and returns False.

    The warning is its own, because verl logs the failure of a plugin at the level DEBUG alone.
    """
    if any("rlk_" in label for label in integration.status().replaced):
        return True  # the patch that RLKERNELS_PATCH asked for has done it, and its strictness stays
    try:
        integration.patch("names", strict=False)
    # Any exception, because nobody else would hear of it.
    except Exception as error:
        message = f"rlkernels: the plugin of verl is not active, no rlk_* names: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


activate()
