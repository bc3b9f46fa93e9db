"""Which native code is used, and by whom: F146, a module of other sources; F149, a choice that stays
with who made it.
"""

import asyncio
import contextvars
import re
import shutil
import textwrap
import threading
from pathlib import Path

import pytest
import subprocesses
import torch
from present_backends import native

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import eager, forced, gate, use_backend
from rlkernels.objectives import cxx

ROOT = Path(rlk.__file__).resolve().parents[1]

# F146 -----------------------------------------------------------------------------------------------------------------


class Module:
    __name__ = "rlkernels._cpu"

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@pytest.mark.fault(146)
def test_a_module_of_other_sources_is_refused_with_what_to_do():
    ours = {"INTERFACE": gate.INTERFACE, "OBJECTIVES_DIGEST": cxx.digest()}
    assert gate.disagreement(Module(**ours)) == ""
    for other, what in (
        ({}, "interface none"),
        ({**ours, "INTERFACE": "0.0.9/1"}, r"interface 0\.0\.9/1"),
        ({**ours, "OBJECTIVES_DIGEST": "0123"}, "objectives 0123"),
    ):
        assert re.match(
            rf"rlkernels\._cpu was built from other sources .*\({what}, expected .*\); run pip install "
            r"again",
            gate.disagreement(Module(**other)),
        )


@pytest.mark.fault(146)
def test_python_and_csrc_name_one_interface_and_it_is_that_of_the_version():
    version, number = gate.INTERFACE.split("/")
    assert version == rlk.__version__.partition(".dev")[0] and int(number) > 0
    header = ROOT / "csrc/interface.h"
    if header.is_file():
        assert f'kInterface = "{gate.INTERFACE}"' in header.read_text()
        assert f'#define RLK_OBJECTIVES_DIGEST "{cxx.digest()}"' in (ROOT / "csrc/objectives.h").read_text()


def test_python_csrc_and_triton_have_one_flag_per_wanted_output():
    flags = {name: getattr(eager, name) for name in ("ENTROPY", "LOG_SUM_SQ", "MEAN_LOGITS", "IS_TOP1", "KL")}
    header, triton = ROOT / "csrc/arguments.h", ROOT / "rlkernels/backends/triton/row_statistics.py"
    assert dict(re.findall(r"^(\w+) = tl\.constexpr\((\d+)\)$", triton.read_text(), re.MULTILINE)).items() >= {
        (name, str(value)) for name, value in flags.items()
    }
    if header.is_file():
        (line,) = re.findall(r"^constexpr unsigned (kEntropy = .*);$", header.read_text(), re.MULTILINE)
        camel = {name: "k" + name.title().replace("_", "") for name in flags}
        assert line == ", ".join(f"{camel[name]} = {value}" for name, value in flags.items())


@pytest.mark.fault(146)
def test_the_digest_follows_formulas_and_not_words():
    names = cxx.builtin()
    assert cxx.digest(names) == cxx.digest() != cxx.digest(names[:-1]) and len(cxx.digest()) == 16
    assert "Schulman" not in cxx.body(names)


@pytest.mark.fault(146)
@native
def test_an_objective_that_was_edited_after_the_build_takes_the_module_away(tmp_path):
    shutil.copytree(Path(rlk.__file__).parent, tmp_path / "rlkernels", ignore=shutil.ignore_patterns("__pycache__"))
    ask = """
        import torch, rlkernels
        state = rlkernels.available_backends()
        print(state["serves"]["cpu"]["elementwise"], "|", state["absent"].get("cpu"))
        serving = state["serves"]["cpu"]["elementwise"]
        print(rlkernels.ops.elementwise("k2", torch.tensor([3.0]), [torch.tensor([1.0])], (), None, serving)[0].item())
    """
    path = str(tmp_path)
    before = subprocesses.child(
        "-c", "import sys; sys.path.insert(0, sys.argv[1])\n" + textwrap.dedent(ask), path
    ).stdout.splitlines()
    assert before == ["cpu | None", "2.0"]
    source = tmp_path / "rlkernels/objectives/kl.py"
    text = source.read_text()
    assert text.count("0.5 * ") >= 1
    source.write_text(text.replace("0.5 * ", "0.75 * ", 1))
    after = subprocesses.child(
        "-c", "import sys; sys.path.insert(0, sys.argv[1])\n" + textwrap.dedent(ask), path
    ).stdout.splitlines()
    assert re.match(r"eager \| rlkernels\._cpu was built from other sources .*objectives \w+, expected", after[0])
    assert after[1] == "3.0"


# F149 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(149)
def test_a_task_keeps_its_choice_to_itself():
    async def chooses(name, steps):
        seen = []
        with use_backend(name):
            for _ in range(steps):
                await asyncio.sleep(0)
                seen.append(forced())
        return {*seen, forced()}

    async def asks(steps):
        seen = set()
        for _ in range(steps):
            await asyncio.sleep(0)
            seen.add(forced())
        return seen

    async def all_of_them():
        other = "cpu" if gate_is_open() else "eager"
        return await asyncio.gather(chooses("eager", 5), asks(5), chooses(other, 3), asks(5)), other

    (first, second, third, fourth), other = asyncio.run(all_of_them())
    assert first == {"eager", None} and third == {other, None} and second == fourth == {None}
    assert forced() is None


def gate_is_open():
    return "cpu" not in rlk.available_backends()["absent"]


@pytest.mark.fault(149)
def test_a_task_that_was_made_inside_takes_the_choice_with_it():
    async def asks():
        return forced()

    async def makes():
        with use_backend("eager"):
            task = asyncio.create_task(asks())
        return await task, forced()

    assert asyncio.run(makes()) == ("eager", None)


@pytest.mark.fault(149)
def test_whoever_ends_takes_away_his_own_choice_and_no_other():
    def generator():
        with use_backend("eager"):
            yield forced()

    first = generator()
    assert next(first) == "eager" and forced() == "eager"  # of the consumer's context, as every context variable
    with use_backend("eager") as outer:
        first.close()
        assert forced() == "eager" and outer is None
    assert forced() is None
    abandoned = generator()
    next(abandoned)
    del abandoned
    assert forced() is None
    both = use_backend("eager")
    with both, both:  # one object twice
        assert forced() == "eager"
    assert forced() is None


@pytest.mark.fault(149)
def test_a_thread_starts_without_a_choice_unless_it_is_handed_the_context():
    seen = []
    with use_backend("eager"):
        context = contextvars.copy_context()
        for target in (lambda: seen.append(forced()), lambda: context.run(lambda: seen.append(forced()))):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == [None, "eager"]


@pytest.mark.fault(149)
def test_a_decorated_function_chooses_at_each_call():
    @use_backend("eager")
    def asks(depth):
        return [forced(), *(asks(depth - 1) if depth else [])]

    assert asks(2) == ["eager"] * 3 and forced() is None
    with (
        pytest.raises(ValueError, match="backend must be one of eager, cpu, triton, cuda; got 'gpu'"),
        use_backend("gpu"),
    ):
        pass


@pytest.mark.fault(149)
def test_a_compiled_program_follows_the_choice_and_may_make_one():
    x, targets = torch.randn(3, 5), torch.tensor([0, 1, 2])
    torch._dynamo.reset()

    def chooses(x, y):
        with use_backend("eager"):
            return rlk.token_logprobs(x, y)

    serving = rlk.available_backends()["serves"]["cpu"]["token_stats"]
    for program, inside in ((rlk.token_logprobs, serving), (chooses, "eager")):
        compiled = torch.compile(lambda x, y, program=program: program(x, y), backend="eager", fullgraph=True)
        before = ops.calls()
        compiled(x, targets)
        assert ops.calls() - before == {("token_stats", inside): 1}
        with use_backend("eager"):
            compiled(x, targets)
        compiled(x, targets)
        assert (ops.calls() - before)["token_stats", inside] == (3 if inside == "eager" else 2) and forced() is None
