"""The one place that says how the package is installed, because no message may name an index that does not have it."""

COMMAND = 'pip install "{}" in a checkout of rlkernels'
"""Until the package is published. Afterwards ``pip install "rlkernels{}"``."""


def how(extra: str = "") -> str:
    """Returns the command that installs the package, with the optional dependencies named ``extra``.

    >>> how("triton")
    'pip install ".[triton]" in a checkout of rlkernels'
    """
    return COMMAND.format(f".[{extra}]" if extra else ".")
