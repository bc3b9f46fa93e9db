"""The programs of examples/ run with a few steps, and the page of examples names them and what they print.

One child runs them all, because most of the time of a short run is the import of torch and transformers. The tests of
``agent_trajectories.py`` and ``fsdp2_policy.py``, which have no short run, are in tests/trajectories and tests/linear.
"""

import importlib.util
import json
import os
import re

import pytest
import subprocesses
from paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUICK = [path for path in EXAMPLES if "--quick" in path.read_text()]
PAGE = ROOT / "docs/examples.md"
ABSENT = "ppo_cartpole.py without gymnasium"

RUNNER = """
    import contextlib, io, json, runpy, sys, traceback

    def run(path):
        text, end = io.StringIO(), None
        sys.argv = [path, "--quick"]
        with contextlib.redirect_stdout(text):
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as stop:
                end = stop.code
            except Exception:
                end = traceback.format_exc()
        return {"printed": text.getvalue(), "end": end}

    runs = {path: run(path) for path in sys.argv[1:]}
    sys.modules["gymnasium"] = None  # an import of it raises ImportError
    runs[ABSENT] = run(next(path for path in runs if path.endswith("ppo_cartpole.py")))
    print(json.dumps(runs))
"""


def packages(path):
    """Returns the optional packages that the docstring of an example tells to install."""
    return re.findall(r"^    pip install (\w+)$", path.read_text(), re.M)


@pytest.fixture(scope="module")
def runs():
    path = os.pathsep.join([subprocesses.PATH, os.environ.get("PYTHONPATH", "")])
    done = subprocesses.code(RUNNER.replace("ABSENT", repr(ABSENT)), *QUICK, PYTHONPATH=path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_an_example_runs_a_few_steps_and_its_table_has_the_columns_of_the_page(path, runs):
    for package in packages(path):
        if importlib.util.find_spec(package) is None:  # no import, because that of transformers takes seconds
            pytest.skip(f"{package} is not installed")
    run = runs[str(path)]
    assert run["end"] in (None, 0), run["end"]
    lines = [line.rstrip() for line in run["printed"].splitlines()]
    header = next(line for line in lines if not re.search(r"\d\.\d", line))
    assert lines[-1] != header and re.search(r"\d\.\d", run["printed"]), run["printed"]
    assert not re.search(r"\b(nan|inf)\b", run["printed"]), run["printed"]
    section = PAGE.read_text().split(f"\n## `{path.name}`\n", 1)[1].split("\n## ", 1)[0]
    assert "```text\n" not in section or header in section.splitlines(), f"the page lacks {header!r}"


def test_an_example_without_its_package_says_in_a_line_what_to_install(runs):
    message = runs[ABSENT]["end"]
    assert message.splitlines() == [message] and message.endswith("pip install gymnasium")


def test_the_page_names_every_example_once():
    named = re.findall(r"^## `(\w+\.py)`$", PAGE.read_text(), re.M)
    assert len(named) == len(set(named))
    assert {path.name for path in EXAMPLES} <= set(named)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 170
    assert re.search(rf"^    (python|torchrun --nproc_per_node \d) examples/{path.name}", text, re.M)
