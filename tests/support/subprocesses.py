"""Child interpreters that see the package under test: where it is installed that one, not the sources in the working
folder.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from paths import SUPPORT

import rlkernels

PATH = os.pathsep.join([str(Path(rlkernels.__file__).resolve().parents[1]), str(SUPPORT)])


def environment(without=(), **variables):
    """This process's environment with the path of the package, less the names in ``without``."""
    return {**{k: v for k, v in os.environ.items() if k not in without}, "PYTHONPATH": PATH, **variables}


def child(*arguments, timeout=300, without=(), **variables):
    """``python ARGUMENTS`` in a folder that holds no source of ours; ``variables`` are added to its environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=os.sep,
        env=environment(without, **variables),
    )


def code(text, *arguments, **options):
    """Runs ``text`` in a child."""
    return child("-c", textwrap.dedent(text), *arguments, **options)
