"""``python -m rlkernels.launch``: the module runs as by itself, hosts are patched when imported, Ray's workers too."""

import importlib
import inspect
import sys
import textwrap
import types
import zipfile

import paths
import pytest
import subprocesses

from rlkernels import launch
from rlkernels.integrations import HOSTS, _after_import, _ray
from rlkernels.integrations._after_import import after_import, is_imported

PROGRAM = """
    import sys
    print(__name__, __spec__.name, __package__, __file__ == sys.argv[0], sys.argv[1:], sys.modules["__main__"].__name__)
    code = sys.argv[-1]
    if code == "boom":
        raise ValueError("boom")
    sys.exit(int(code) if code.isdigit() else code)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of modules in front of ``sys.path``; whatever is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(name, text):
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(tmp_path).parents:
            if parent.name:
                (tmp_path / parent / "__init__.py").touch()
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return path

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def launched(monkeypatch, capsys):
    """``main`` in this process, without a trace of it: what it prints, and its exit code."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(launch, "_seen", set())
    monkeypatch.setattr(launch.atexit, "register", lambda *args: None)
    monkeypatch.setattr(launch, "hook_workers", lambda *args: None)
    monkeypatch.setattr(launch, "after_import", lambda *args: None)

    def run(*arguments):
        code = 0
        try:
            launch.main(arguments)
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return types.SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def test_a_child_behaves_as_python_m_does(folder, tmp_path):
    folder("pkg.program", PROGRAM)
    for arguments in (["--patch", "x", "-h", "7"],):
        alone = subprocesses.child("-m", "pkg.program", *arguments, PYTHONPATH=f"{tmp_path}:{subprocesses.PATH}")
        ours = subprocesses.child(
            "-m", "rlkernels.launch", "pkg.program", *arguments, PYTHONPATH=f"{tmp_path}:{subprocesses.PATH}"
        )
        assert alone.stdout.strip(), alone.stderr
        assert (ours.returncode, ours.stdout) == (alone.returncode, alone.stdout) == (7, alone.stdout)
        assert "openrlhf was not imported here; nothing was patched" in ours.stderr


@pytest.mark.parametrize("code", ("0", "3", "stopped by itself"))
def test_the_module_gets_its_arguments_and_its_exit_code_comes_out(folder, launched, code):
    path = folder("pkg.program", PROGRAM)
    found = launched("--patch", "trl", "pkg.program", "--patch", "verl", "--help", code)
    assert (
        found.out.split() == f"__main__ pkg.program pkg True ['--patch', 'verl', '--help', {code!r}] __main__".split()
    )
    assert found.code == (int(code) if code.isdigit() else code)
    assert path.exists()


def test_what_the_module_raises_comes_out(folder, launched):
    folder("pkg.program", PROGRAM)
    with pytest.raises(ValueError, match="boom"):
        launched("pkg.program", "boom")


def test_a_package_runs_its_main_module(folder, launched):
    folder("pkg.__main__", "print(__name__, __package__)")
    assert launched("pkg").out.split() == ["__main__", "pkg"]


def test_a_module_that_is_not_there_is_named(folder, launched):
    folder("pkg.program", PROGRAM)
    for module, words in (
        ("pkg.nothing", "no module named 'pkg.nothing'"),
        ("no_such_package.train", "no module named 'no_such_package' (of 'no_such_package.train')"),
        ("pkg", "'pkg' is a package and cannot be run"),
        ("train.py", "'train.py' is a file; pass the name of a module"),
    ):
        found = launched(module)
        assert found.code == 1 and words in found.err, found


def test_a_module_whose_package_fails_to_import_shows_that_error(folder, launched):
    folder("pkg.program", PROGRAM)
    folder("pkg.__init__", "import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        launched("pkg.program")


def test_a_wrong_command_line_is_an_error_of_its_own(launched):
    for arguments, words in (
        ((), "MODULE"),
        (("--patch", "deepspeed", "json"), "'deepspeed'"),
        (("--patch", ",", "json"), "no trainer"),
    ):
        found = launched(*arguments)
        assert found.code == 2 and words in found.err, found


def test_help_names_the_option_and_the_hosts(launched):
    found = launched("--help")
    assert found.code == 0 and all(word in found.out for word in ("--patch", "MODULE", *HOSTS))


# The moment of the patch.


def test_an_action_runs_once_when_the_module_has_been_executed(folder):
    folder("late.models", "value = 1")
    seen = []
    after_import("late.models", lambda: seen.append(sys.modules["late.models"].value))
    importlib.import_module("late")
    assert seen == [] and not is_imported("late.models")
    importlib.import_module("late.models")
    importlib.reload(sys.modules["late.models"])
    assert seen == [1]
    after_import("late.models", lambda: seen.append(2))
    assert seen == [1, 2]
    assert inspect.getsource(sys.modules["late.models"]).strip() == "value = 1"


def test_the_sibling_of_a_module_in_a_zip_file_does_not_trigger_its_action(folder, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "late.zip", "w") as archive:
        for name, text in (("__init__", ""), ("sibling", ""), ("models", "from late import sibling\nvalue = 1")):
            archive.writestr(f"late/{name}.py", text)
    monkeypatch.syspath_prepend(str(tmp_path / "late.zip"))
    seen = []
    after_import("late.models", lambda: seen.append(sys.modules["late.models"].value))
    importlib.import_module("late.models")
    assert seen == [1]


def test_a_cancelled_action_does_not_run_and_the_others_do(folder):
    folder("late", "")
    seen = []
    cancel = after_import("late", lambda: seen.append("cancelled"))
    after_import("late", lambda: seen.append("kept"))
    cancel()
    cancel()
    importlib.import_module("late")
    assert seen == ["kept"]


def test_what_an_action_raises_goes_to_the_importer(folder):
    folder("late", "")

    def refuse():
        raise RuntimeError("unknown version")

    after_import("late", refuse)
    with pytest.raises(RuntimeError, match="unknown version"):
        importlib.import_module("late")
    assert not _after_import._watcher.actions


def test_a_host_is_patched_and_reported_when_it_is_imported(folder, monkeypatch, capsys):
    folder("late", "")
    report = types.SimpleNamespace(host="Late 1.0", replaced=("late.f -> rlkernels",), skipped=("late.g absent",))
    host = types.ModuleType("rlkernels.integrations.late")
    host.patch = lambda: report
    monkeypatch.setitem(sys.modules, host.__name__, host)
    monkeypatch.setitem(launch.TRIGGERS, "late", "late")
    monkeypatch.setattr(launch, "_seen", set())
    monkeypatch.setattr(launch.atexit, "register", lambda *args: None)
    launch.patch_when_imported(["late", "late"])
    assert capsys.readouterr().err == ""
    importlib.import_module("late")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("rlkernels.launch: ")[2].partition(": ")[2] or line for line in lines] == [
        "Late 1.0 patched, 1 attributes",
        "rlkernels.launch:   late.f -> rlkernels",
        "rlkernels.launch:   late.g absent",
    ]


def test_every_host_has_a_trigger():
    assert set(HOSTS) <= set(launch.TRIGGERS)


# Ray.

CALLED = []


def record(names):
    CALLED.append(names)


@pytest.fixture
def fake_ray(monkeypatch):
    ray = types.ModuleType("ray")
    ray.calls = []

    def init(*args, **kwargs):
        """Starts Ray."""
        ray.calls.append((args, kwargs))
        return "context"

    ray.init = init
    monkeypatch.setitem(sys.modules, "ray", ray)
    CALLED.clear()
    return ray


SET_UP = f"{__name__}:record"


def test_ray_init_gets_the_hook_beside_everything_that_a_program_hands_it(fake_ray):
    _ray.hook_workers(["openrlhf", "trl"], SET_UP)
    _ray.hook_workers(["openrlhf", "trl"], SET_UP)
    environment = {"env_vars": {"A": "1"}}
    assert fake_ray.init("auto", num_cpus=2, runtime_env=environment) == "context"
    ((args, kwargs),) = fake_ray.calls
    hook = kwargs["runtime_env"].pop(_ray.HOOK)
    assert args == ("auto",) and kwargs == {"num_cpus": 2, "runtime_env": environment}
    assert environment == {"env_vars": {"A": "1"}} and fake_ray.init.__doc__ == "Starts Ray."
    hook()
    assert CALLED == [("openrlhf", "trl")]


def test_ray_init_without_an_environment_and_with_that_of_a_job(fake_ray):
    _ray.hook_workers(["trl"], SET_UP)
    fake_ray.init()
    fake_ray.init(job_config=types.SimpleNamespace(runtime_env={"pip": ["x"]}))
    first, second = (kwargs["runtime_env"] for _, kwargs in fake_ray.calls)
    assert list(first) == [_ray.HOOK] and list(second) == ["pip", _ray.HOOK]


def own_hook():
    CALLED.append("own")


@pytest.mark.parametrize("own", (own_hook, f"{__name__}.own_hook", None))
def test_a_hook_that_the_program_has_runs_first(own):
    CALLED.clear()
    merged = _ray.with_hook({_ray.HOOK: own}, ["trl"], SET_UP)
    merged[_ray.HOOK]()
    assert CALLED == [*(["own"] if own else []), ("trl",)]
    assert merged[_ray.HOOK].__name__  # Ray shows it


def test_a_hook_that_is_neither_a_function_nor_a_name_is_refused():
    with pytest.raises(TypeError, match="worker_process_setup_hook"):
        _ray.with_hook({_ray.HOOK: 3}, ["trl"], SET_UP)


WORKERS = """
    import os
    import sys

    import ray

    def own_hook():
        os.environ["OWN_HOOK"] = "ran"

    @ray.remote(num_cpus=1)
    class Worker:
        def train(self):
            import openrlhf_host
            import torch

            assert "openrlhf" not in sys.modules
            models = openrlhf_host.imported()
            loss = models.PolicyLoss()(*[torch.zeros(1, 2)] * 2, *[torch.ones(1, 2)] * 2)[0]
            import rlkernels

            return os.getpid(), os.environ.get("OWN_HOOK"), loss.item(), rlkernels.status()["openrlhf"].calls

    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"worker_process_setup_hook": own_hook})
    workers = [Worker.remote() for _ in range(2)]
    for found in ray.get([worker.train.remote() for worker in workers]):
        print("FOUND", *found)
    ray.shutdown()
    sys.exit(5)
"""


def test_the_workers_of_a_real_ray_cluster_are_patched_and_each_says_so(folder, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    openrlhf = pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: pip install --no-deps openrlhf")
    folder("job", WORKERS)
    installed = [str(paths.Path(module.__file__).parents[1]) for module in (ray, openrlhf)]
    done = subprocesses.child(
        *["-m", "rlkernels.launch", "job"],
        PYTHONPATH=":".join([str(tmp_path), subprocesses.PATH, *dict.fromkeys(installed)]),
        RAY_AUTH_MODE="disabled",
        RAY_DEDUP_LOGS="0",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 5, done.stdout + done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len({process for process, *_ in found}) == 2
    for process, own, loss, *calls in found:
        assert own == "ran" and float(loss) == -1.0 and "{'PolicyLoss': 1}" in " ".join(calls)
        said = f"rlkernels.launch: process {process} (Ray worker): OpenRLHF 0.11.2 patched"
        assert said in done.stdout + done.stderr, done.stderr


def test_a_program_of_trl_is_patched_by_the_command_and_by_the_variable_only_where_something_imports_us(
    folder, tmp_path
):
    pytest.importorskip("trl", reason="TRL is not installed")
    said = "print('rlkernels' in sys.modules, *sys.modules['rlkernels'].status()['trl'].replaced)"
    folder("job", f"import sys, trl\n{said}")
    place = {"PYTHONPATH": f"{tmp_path}:{subprocesses.PATH}"}
    ours = subprocesses.child("-m", "rlkernels.launch", "--patch", "trl", "job", **place)
    assert ours.stdout.startswith("True trl."), ours.stdout + ours.stderr
    alone = subprocesses.child("-c", "import sys; print('rlkernels' in sys.modules)", RLKERNELS_PATCH="trl", **place)
    assert alone.stdout == "False\n"
