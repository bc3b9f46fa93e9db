"""The patcher that all trainers share, on a host of three modules; the environment switch; ``rlkernels.status``."""

import sys
import types

import pytest
import subprocesses

import rlkernels
from rlkernels.integrations import _patching, patch_from_environment
from rlkernels.integrations._patching import ABSENT, Host, Plan, Site


def module(name, source=""):
    made = types.ModuleType(name)
    exec(source, vars(made))
    return made


@pytest.fixture
def modules(monkeypatch):
    """A host: ``fake.core`` defines, ``fake.user`` holds a name of its own."""
    package = module("fake", "__version__ = '2.1.3'")
    core = module("fake.core", "def f(x, scale=1): return x * scale\nclass Loss:\n    def call(self): return 'theirs'")
    core.registry = {"old": core.f}
    user = module("fake.user")
    user.g = core.f
    for made in (package, core, user):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return types.SimpleNamespace(core=core, user=user)


@pytest.fixture
def host():
    return Host("fake", "fake", title="Fake", series=("2.0", "2.1"))


def planners(host, modules, **further):
    core = modules.core

    def function():
        site = Site.of(core, "f")
        original = host.require_own(site, "fake.core")
        host.require_signature("f", original, [("x", "scale")])
        ours = host.counted("f", original, lambda x, scale=1: -x, lambda x, scale=1: "negative" if x < 0 else None)
        return Plan(original, ours, (site,))

    def method():
        site = Site.of(core.Loss, "call")
        return Plan(site.read(), lambda self: "ours", (site,))

    def entry():
        return Plan(ABSENT, max, (Site.of(core.registry, "new", "registry['new']"),))

    return {"function": function, "method": method, "entry": entry, **further}


def test_names_methods_and_entries_are_replaced_and_restored_to_the_very_objects(host, modules):
    core, user = modules.core, modules.user
    before = core.f, vars(core.Loss)["call"]
    report = host.patch(planners(host, modules, gone=lambda: "gone: this version lacks it"))
    assert report.host == "Fake 2.1.3" and report.skipped == ("gone: this version lacks it",)
    assert report.replaced == (
        "fake.core.f -> rlkernels (function)",
        "fake.user.g -> rlkernels (function)",
        "fake.core.Loss.call -> rlkernels (method)",
        "registry['new'] -> rlkernels (entry)",
    )
    assert core.f is user.g is not before[0] and core.f(3) == -3 and core.Loss().call() == "ours"
    assert core.f.__name__ == "f" and core.registry == {"old": before[0], "new": max}
    late = module("fake.late")
    late.h = core.f
    sys.modules["fake.late"] = late
    try:
        host.unpatch()
    finally:
        del sys.modules["fake.late"]
    assert core.f is user.g is late.h is before[0] and vars(core.Loss)["call"] is before[1]
    assert core.registry == {"old": before[0]} and host.status().replaced == ()


def test_an_inherited_method_is_removed_again_and_not_copied_to_the_subclass(host, modules):
    class Child(modules.core.Loss):
        pass

    site = Site.of(Child, "call", "Child.call")
    host.patch({"method": lambda: Plan(ABSENT, lambda self: "ours", (site,))})
    assert Child().call() == "ours" and modules.core.Loss().call() == "theirs"
    host.unpatch()
    assert "call" not in vars(Child) and Child().call() == "theirs"


def test_a_second_patch_finds_the_modules_that_came_meanwhile(host, modules, monkeypatch):
    original = modules.core.f
    host.patch(planners(host, modules))
    late = module("fake.late")
    late.h = original  # from a copy of the name that was bound before the patch
    monkeypatch.setitem(sys.modules, "fake.late", late)
    assert "fake.late.h -> rlkernels (function)" in host.patch(planners(host, modules)).replaced
    assert late.h is modules.core.f
    host.unpatch()
    assert late.h is original


@pytest.mark.parametrize("fails", ("plan", "write"))
def test_a_patch_that_fails_half_way_leaves_nothing(host, modules, fails):
    class Stubborn(dict):
        def __setitem__(self, key, value):
            raise TypeError("read-only")

    def last():
        if fails == "plan":
            raise host.refusal("no")
        return Plan(ABSENT, max, (Site.of(Stubborn(), "new", "stubborn"),))

    before = modules.core.f
    with pytest.raises((RuntimeError, TypeError), match=r"^Fake 2\.1\.3: no; nothing was patched$|^read-only$"):
        host.patch(planners(host, modules, last=last))
    assert modules.core.f is modules.user.g is before and "new" not in modules.core.registry
    assert host.status().replaced == () and modules.core.Loss().call() == "theirs"


def test_calls_are_counted_and_strict_decides_about_the_others(host, modules):
    host.patch(planners(host, modules))
    modules.user.g(2)
    with pytest.raises(RuntimeError, match=r"^f: negative; patch\(strict=False\) hands such calls to the original$"):
        modules.user.g(-2)
    host.patch(planners(host, modules), strict=False)
    assert modules.user.g(-2, scale=3) == -6
    status = host.status()
    assert status.calls == {"f": 1} and status.delegations == {("f", "negative"): 1} and status.host == "Fake 2.1.3"
    host.unpatch()
    host.patch(planners(host, modules))
    assert host.status().calls == {} and host.status().delegations == {}
    assert host.delegate("f", max, "by contract", by_contract=True) is max  # under strict, too
    with pytest.raises(RuntimeError, match="there is no original to hand it to"):
        host.delegate("f", None, "empty", by_contract=True)
    host.unpatch()


def test_a_wrapper_of_another_library_is_refused_though_it_took_the_name_of_what_it_wraps(host, modules):
    import functools

    core, original = modules.core, modules.core.f
    core.f = functools.wraps(original)(lambda x, scale=1: original(x, scale))
    assert core.f.__name__ == "f"
    with pytest.raises(RuntimeError, match=r"fake\.core\.f is .* another library has patched it"):
        host.patch(planners(host, modules))
    assert modules.user.g is original


@pytest.mark.parametrize(
    ("version", "strict", "message"),
    [
        ("1.9", False, r"Fake 1\.9: known are 2\.0\.x, 2\.1\.x; nothing was patched$"),
        ("2.2.0", True, r"Fake 2\.2\.0: .*; patch\(strict=False\) accepts a newer one"),
        ("2.10", True, r"Fake 2\.10: "),
    ],
)
def test_versions_out_of_the_series_are_refused(host, modules, version, strict, message):
    sys.modules["fake"].__version__ = version
    with pytest.raises(RuntimeError, match=message):
        host.patch(planners(host, modules), strict)
    if version != "1.9":
        assert host.patch(planners(host, modules), strict=False).replaced
        host.unpatch()


def test_a_strict_that_is_no_bool_is_refused(host, modules):
    with pytest.raises(TypeError, match="fake.patch: strict must be True or False"):
        host.patch(planners(host, modules), strict="False")
    assert not host.status().replaced


def test_a_host_that_is_not_installed_says_what_to_install():
    absent = Host("absent", "no_such_package", title="Absent", install="pip install absent")
    with pytest.raises(ImportError, match=r"rlkernels\.integrations\.absent needs Absent .*; pip install absent$"):
        absent.patch({})


def test_status_lists_the_hosts_that_registered(host, modules, monkeypatch):
    monkeypatch.setattr(_patching, "_registered", {})
    assert rlkernels.status() == {}
    _patching.register(host).patch(planners(host, modules))
    assert list(rlkernels.status()) == ["fake"] and "fake.core.f" in rlkernels.status()["fake"].replaced
    host.unpatch()


def test_the_environment_names_trainers_and_an_unknown_one_is_refused_with_the_known(monkeypatch):
    patched = []
    made = module("rlkernels.integrations.verl")
    made.patch = lambda: patched.append("verl")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setenv("RLKERNELS_PATCH", "verl, verl,")
    assert list(patch_from_environment()) == patched == ["verl"]
    monkeypatch.setenv("RLKERNELS_PATCH", "verl,vrel")
    with pytest.raises(ValueError, match=r"RLKERNELS_PATCH names \['vrel'\]; known are \['trl', 'verl', 'openrlhf'"):
        patch_from_environment()
    assert patched == ["verl"]

    def refuse():
        raise RuntimeError("verl 9: no")

    made.patch = refuse
    monkeypatch.setenv("RLKERNELS_PATCH", "verl")
    with pytest.warns(RuntimeWarning, match="RLKERNELS_PATCH=verl patched nothing: RuntimeError: verl 9: no"):
        assert patch_from_environment() == {}


def test_import_patches_what_the_environment_names_and_warns_of_what_is_not_installed():
    code = """
        import os, sys, warnings
        sys.modules["trl"] = None  # as where it is not installed
        try:
            import rlkernels
        except ValueError as error:
            print(error)
        os.environ["RLKERNELS_PATCH"] = "trl"
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import rlkernels
        print([str(w.message) for w in seen if "RLKERNELS_PATCH" in str(w.message)], list(rlkernels.status()))
    """
    done = subprocesses.code(code, RLKERNELS_PATCH="tlr")
    assert done.returncode == 0, done.stderr
    refused, warned = done.stdout.splitlines()
    assert refused.startswith("RLKERNELS_PATCH names ['tlr']")
    assert "RLKERNELS_PATCH=trl patched nothing: ImportError: rlkernels.integrations.trl needs TRL" in warned
    assert warned.endswith("['trl']")
