"""Runs tests that verl publishes with its own functions, and then with ours under its names.

    pip install --no-deps --target A verl==0.9.1    # and what it imports
    PYTHONPATH=.:A python tests/integrations/published_verl.py [FOLDER FILE ...]

Without arguments the tests are those that the wheel brings; FOLDER is another checkout of verl's tests. The exit code
is 1 where the outcomes differ.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
FILES = [
    f"tests/trainer/ppo/test_{name}.py"
    for name in (
        "core_algos_on_cpu",
        "dynamic_policy_losses_on_cpu",
        "loss_aggregation_on_cpu",
        "reinforce_pp_multiturn_on_cpu",
        "rollout_corr",
        "rollout_corr_integration",
        "value_loss_normalization_on_cpu",
    )
]


def run(folder, files, *plugins):
    """The counts of pytest by outcome, the tests that did not pass, and the lines of our calls."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(SUPPORT)])
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    arguments = [*pytest, "--rootdir", folder, *plugins, *files]
    done = subprocess.run(arguments, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    bad = sorted(line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    return counts, bad, [line for line in done.stdout.splitlines() if line.startswith("calls ")]


def main(arguments):
    spec = importlib.util.find_spec("verl")
    if spec is None:
        sys.exit("verl is not installed: pip install --no-deps verl==0.9.1")
    folder = arguments[0] if arguments else Path(spec.submodule_search_locations[0]).parent
    files = arguments[1:] or FILES
    stock, ours = run(folder, files), run(folder, files, "-p", "verl_under_ours")
    print("stock:", stock[0], *stock[1], sep="\n  ")
    print("ours: ", ours[0], *ours[1], *ours[2], sep="\n  ")
    sys.exit(0 if stock[:2] == ours[:2] and stock[0].get("passed") else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
