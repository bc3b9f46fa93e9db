"""The list of deliberate mistakes is up to date, and the script that plants them tells what is noticed from what is
not.
"""

import runpy
import shutil
import sys

import pytest
from paths import ROOT, TESTS

MUTATION = TESTS / "repository/mutation"
SCRIPT = runpy.run_path(str(MUTATION / "__main__.py"), run_name="mutation")
LISTS, run = SCRIPT["LISTS"], SCRIPT["run"]
from mutant import FAULTS, Mutant, problems  # noqa: E402  (the script has put its folder on the path)

pytestmark = pytest.mark.skipif(
    not (ROOT / "rlkernels").is_dir(), reason="the sources are not here: the tests run on an installed package"
)


def named(backend, *names):
    return [(backend, m) for m in LISTS[backend] if m.name in names]


@pytest.mark.parametrize("backend", LISTS)
def test_every_mutant_still_applies_and_its_tests_are_there(backend):
    assert problems(ROOT, LISTS[backend]) == []


@pytest.mark.parametrize("backend, least", [("cuda", 25), ("triton", 25), ("cpu", 12), ("python", 15), ("head", 15)])
def test_every_backend_has_its_share_of_mutants_under_names_of_their_own(backend, least):
    names = [m.name for m in LISTS[backend]]
    assert len(set(names)) == len(names) >= least
    assert sum(bool(m.equivalent) for m in LISTS[backend]) <= 0.05 * len(names), (
        "a mutant that nothing can notice proves nothing"
    )


def test_every_kind_of_fault_is_planted_somewhere():
    assert {fault for mutants in LISTS.values() for m in mutants for fault in m.faults if not m.equivalent} == set(
        FAULTS
    )


def test_a_text_that_is_gone_or_ambiguous_and_a_test_that_is_gone_are_named():
    ours = LISTS["python"][0]
    wrong = [
        ours._replace(old="no such text"),
        ours._replace(old="return"),
        ours._replace(new=ours.old),
        ours._replace(tests=("test_nowhere.py",)),
    ]
    found = "\n".join(problems(ROOT, wrong))
    for text in ("occurs 0 times", "expected once", "changes nothing", "asks test_nowhere.py, which is not there"):
        assert text in found


@pytest.mark.fault(112)
def test_mistakes_in_the_python_are_really_noticed():
    todo = named("python", "the deviation of a population", "spans are not shifted", "sums multiply by the mask")
    # Three tests of two files, not all of both: some compile, which says nothing of the script.
    asked = (
        "test_group_advantages.py::test_group_advantages_equal_a_loop_over_the_responses",
        "test_sequences.py::test_dead_garbage_reaches_neither_result_nor_gradient",
        "test_sequences.py::test_spans_become_a_mask_over_the_scored_positions",
    )
    todo = [(backend, m._replace(tests=asked)) for backend, m in todo]
    assert len(todo) == 3 and run(ROOT, todo, show=lambda *_, **__: None) == {
        f"python: {m.name}": True for _, m in todo
    }


@pytest.mark.fault(112)
def test_a_mistake_in_a_cuda_kernel_is_really_noticed(host_module_sources):
    todo = named("cuda", "gamma is left out of the trace")
    assert run(ROOT, todo, show=lambda *_, **__: None) == {"cuda: gamma is left out of the trace": True}


@pytest.fixture
def host_module_sources(pytestconfig):
    """The CUDA sources for the CPU, built once for this test and those of the backend: a mutant's tree takes over the
    objects.
    """
    sys.path.insert(0, str(TESTS / "backends/cuda_backend"))
    host_build = pytest.importorskip("host_build")
    if host_build.CXX is None:
        pytest.skip("no C++ compiler: the CUDA sources cannot be run on the CPU")
    if hasattr(pytestconfig, "cache"):  # else the tree builds all of it
        host_build.build(pytestconfig.cache.mkdir("cuda_host"))


@pytest.fixture
def project(tmp_path):
    """A package of one function, and one test of it."""
    for folder in ("rlkernels", "tests/repository/mutation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "rlkernels/__init__.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "tests/test_half.py").write_text(
        "from rlkernels import half\n\n\ndef test_half():\n    assert half(4) == 2\n"
    )
    shutil.copy(MUTATION / "warm.py", tmp_path / "tests/repository/mutation")
    return tmp_path


def test_what_survives_and_what_is_broken_is_told_from_what_is_noticed(project):
    def change(name, new):
        return "python", Mutant(name, "rlkernels/__init__.py", "x / 2", new, ("test_half.py",))

    lines = []
    found = run(
        project,
        [change("noticed", "x / 3"), change("missed", "x // 2"), change("broken", "x / 2)")],
        show=lambda line, **_: lines.append(line),
    )
    assert found == {"python: noticed": True, "python: missed": False, "python: broken": None}
    assert [line.split()[0] for line in lines] == ["python:", "killed", "SURVIVED", "BROKEN"]
    assert "test_half.py::test_half" in lines[1]
    (project / "rlkernels/__init__.py").write_text("def half(x):\n    return x\n")
    with pytest.raises(SCRIPT["Impossible"], match="do not pass on the unchanged sources"):
        run(project, [change("noticed", "x / 3")])
