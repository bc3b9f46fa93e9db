"""Runs the tests that OpenRLHF's wheel brings, with its own loss layer and then with ours under its names.

    pip install --no-deps --target A openrlhf==0.11.2 && PYTHONPATH=.:A python tests/integrations/published_openrlhf.py

Tests whose dependencies are missing are errors of both runs alike. The exit code is 1 where the outcomes differ.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def run(folder, *plugins):
    """The counts of pytest by outcome, the tests that did not pass, and the line of our calls."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(SUPPORT)])
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    arguments = [*pytest, "--rootdir", folder, *plugins, folder / "tests"]
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    bad = sorted(line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    calls = [line for line in done.stdout.splitlines() if line.startswith("calls of ours")]
    return counts, bad, calls


def main():
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        sys.exit("OpenRLHF is not installed: pip install --no-deps openrlhf==0.11.2")
    folder = Path(spec.submodule_search_locations[0]).parent
    stubs = ("-p", "openrlhf_host")
    stock, ours = run(folder, *stubs), run(folder, *stubs, "-p", "openrlhf_under_ours")
    print("stock:", stock[0], *stock[1], sep="\n  ")
    print("ours: ", ours[0], *ours[1], *ours[2], sep="\n  ")
    sys.exit(0 if stock[:2] == ours[:2] else 1)


if __name__ == "__main__":
    main()
