"""Child interpreters that see the package under test: where it is installed that one, not the sources in the working
folder.
"""

import json
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


def reports_of_two_ranks(folder, script, *arguments, timeout=180, **variables):
    """Runs ``python SCRIPT RANK ARGUMENTS`` twice at a time; returns what each rank printed last, read as JSON.

    What a rank writes to stderr stays in the ``folder``.
    """
    started = [
        subprocess.Popen(
            [sys.executable, SUPPORT / script, str(rank), *map(str, arguments)],
            cwd=os.sep,
            env=environment(OMP_NUM_THREADS="1", **variables),
            stdout=subprocess.PIPE,
            stderr=(folder / f"{rank}.log").open("w"),
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, text in enumerate(printed):
        assert text.strip(), f"rank {rank} wrote no report: {(folder / f'{rank}.log').read_text()[-3000:]}"
    return [json.loads(text.splitlines()[-1]) for text in printed]
