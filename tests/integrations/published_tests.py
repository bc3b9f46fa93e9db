"""Runs tests that trainers publish, stock and with ours under the trainer's names, and compares the outcomes.

``python tests/integrations/published_tests.py SUITE CHECKOUT``: SUITE is a key of ``SUITES``, CHECKOUT a checkout of
the trainer's repository, of which nothing is copied. The trainer itself is the one on the path. The exit code is 1
where a test passes stock and fails with ours, and neither is it one of those that ``SUITES`` runs again.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
FUSED = "TestChunkedLogProbFunction or TestPatchChunkedLMHead"
SUITES = {
    # The tests of TRL 1.10-dev, whose functions have the signatures of TRL 1.12.
    "trl": {
        "plugin": "trl_published",
        "tests": ["tests/test_utils.py"],
        "select": f"TestEntropyFromLogits or TestSelectiveLogSoftmax or {FUSED}",
        # The reference rounds its logits to bf16 before the softmax, and so does the patch of these two.
        "rounded": ["test_backward_bfloat16"],
    },
    # The wheel brings its tests: CHECKOUT is the folder that it is installed into.
    "openrlhf": {"plugin": "openrlhf_under_ours", "tests": ["tests"], "select": "", "rounded": []},
}
"""Per suite: the plugin of tests/support that puts ours under the names, the tests, and those of them that may differ
and must pass in the mode ``rounded`` of the plugin.
"""


def run(suite, checkout, mode, select):
    """Returns the outcome of each test, and the line of our calls."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(SUPPORT), str(checkout)])
    environment = {**os.environ, "PYTHONPATH": path, "PUBLISHED": mode, "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-p",
        suite["plugin"],
    ]
    command += ["-c", os.devnull, "--rootdir", ".", "-k", select, *suite["tests"]]
    done = subprocess.run(command, cwd=checkout, env=environment, text=True, capture_output=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+(?: \S+\])?)", done.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    calls = [line for line in done.stdout.splitlines() if line.startswith("calls of ours")]
    return {test: outcome for outcome, test in found}, calls


def main(name, checkout):
    suite = SUITES[name]
    stock, _ = run(suite, checkout, "stock", suite["select"])
    ours, calls = run(suite, checkout, "ours", suite["select"])
    again = run(suite, checkout, "rounded", " or ".join(suite["rounded"]))[0] if suite["rounded"] else {}
    for title, found in (("stock", stock), ("ours", ours), ("ours, rounded", again)):
        print(f"{title}: {sum(x == 'PASSED' for x in found.values())} of {len(found)} pass")
    print(*calls, sep="\n")
    worse = [test for test, outcome in stock.items() if outcome == "PASSED" != ours.get(test)]
    for test in worse:
        print("differs:", test, "rounded:", again.get(test, "not run"))
    return any(again.get(test) != "PASSED" for test in worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve()))
