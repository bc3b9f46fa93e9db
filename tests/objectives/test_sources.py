"""Where the source of an objective comes from: files, notebook cells, ``exec``, ``python -c``."""

import linecache
import subprocess
import sys

import pytest
import subprocesses

from rlkernels.objectives import OBJECTIVES, objective

CODE = '''
from rlkernels.objectives import objective

@objective
def of_a_cell(logp, advantage, scale=0.5):
    """Scaled REINFORCE."""
    return -scale * advantage * logp, -scale * advantage
'''


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    yield
    OBJECTIVES.pop("of_a_cell", None)


def execute(source, shown, name):
    """Runs ``source`` as a notebook does, with ``shown`` as the text of its cell."""
    linecache.cache[name] = (len(shown), None, shown.splitlines(True), name)
    scope = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), scope)
    return scope["of_a_cell"]


@pytest.mark.parametrize("name", ["<ipython-input-3-abc>", "/tmp/ipykernel_7/123.py", "<made>"])
def test_a_cell_whose_source_is_in_linecache_registers_and_may_run_twice(name):
    first = execute(CODE, CODE, name)
    assert OBJECTIVES["of_a_cell"].function is first
    again = execute(CODE.replace("0.5", "0.25"), CODE.replace("0.5", "0.25"), name)
    assert OBJECTIVES["of_a_cell"].function is again and OBJECTIVES["of_a_cell"].defaults == (("scale", 0.25),)


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (CODE.replace("-scale * advantage\n", "scale * advantage\n"), "is not that of the function; import it anew"),
        (CODE.replace("logp, -scale", "logp, -2.0 * scale"), "is not that of the function; import it anew"),
        (CODE.replace("of_a_cell", "of_another"), "is not that of the function; import it anew"),
        ("\n" * 20, "no source found; for code of exec, enter its source into linecache.cache"),
        ("\n\n\n\nx = (\n", "no source found; for code of exec"),
    ],
)
def test_the_source_of_another_function_is_refused(shown, message):
    with pytest.raises(TypeError, match=f"objective 'of_a_cell'.*{message}"):
        execute(CODE, shown, "<shared name>")
    assert "of_a_cell" not in OBJECTIVES


def test_exec_without_a_source_is_refused():
    with pytest.raises(TypeError, match="objective 'of_a_cell' must be defined in a file or a notebook cell"):
        exec(compile(CODE, "<nowhere to be read>", "exec"), {"__name__": "__main__"})


def test_python_dash_c_registers_where_python_keeps_its_source():
    done = subprocess.run(
        [sys.executable, "-c", CODE + "\nprint(of_a_cell.__name__)"],
        env=subprocesses.environment(),
        capture_output=True,
        text=True,
    )
    if sys.version_info >= (3, 13):
        assert done.stdout == "of_a_cell\n", done.stderr
    else:
        assert "must be defined in a file or a notebook cell: no source found" in done.stderr


def test_a_local_of_an_outer_function_is_refused_by_the_language():
    scale = 2.0

    def enclosed(logp, advantage):
        """d"""
        return -scale * advantage * logp, -scale * advantage

    with pytest.raises(TypeError, match="'scale' is not in the language"):
        objective(enclosed)
