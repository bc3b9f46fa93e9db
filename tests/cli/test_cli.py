"""``rlkernels doctor`` end to end, the tables of the commands, and the README's example."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

import rlkernels
from rlkernels.backends import DEVICES, absent, measured_order
from rlkernels.cli import doctor, machine, main, self_test, tables
from rlkernels.installing import how


@pytest.fixture
def without_rich(monkeypatch):
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)


def test_doctor_names_versions_ops_absent_backends_and_variables(capsys, without_rich):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    state = rlkernels.available_backends()
    names = [*state["serves"]["cpu"], *state["absent"], *state["absent"].values(), *doctor.ENVIRONMENT]
    for expected in [torch.__version__, machine.processor(), *names]:
        assert expected in printed, f"{expected!r} is missing"


def test_doctor_says_which_instruction_set_the_cpu_backend_uses(capsys):
    main(["doctor", "--plain"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("instruction set"))
    absent = "cpu" in rlkernels.available_backends()["absent"]
    assert line.split()[-1] in ({"-"} if absent else {"amx", "avx512", "avx2", "baseline"})


def test_doctor_tells_the_reason_where_the_cpu_backend_is_absent(capsys, monkeypatch):
    state = {"serves": {"cpu": {"token_stats": "eager"}}, "absent": {"cpu": "no C++ compiler was found"}}
    monkeypatch.setattr(rlkernels, "available_backends", lambda: state)
    assert main(["doctor", "--plain"]) == 0
    printed = capsys.readouterr().out
    assert "no C++ compiler was found" in printed
    assert "every backend and package is here" not in printed


def test_doctor_prints_the_measured_choice_or_says_that_nothing_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(measured_order, "TABLE", {})
    main(["doctor", "--plain"])
    printed = capsys.readouterr().out
    assert "nothing has been measured on a GPU yet; the order below is used" in printed
    assert re.search(r"^cuda +triton, cuda, eager$", printed, re.MULTILINE)
    monkeypatch.setattr(
        measured_order,
        "TABLE",
        {
            ("fused_policy", "cuda", 2, "large"): ("cuda", "triton"),
            ("fused_policy", "cuda", 2, "small"): ("triton", "cuda"),
        },
    )
    main(["doctor", "--plain"])
    printed = capsys.readouterr().out
    assert re.search(r"^fused_policy +cuda +2 bytes +large +cuda, triton$", printed, re.MULTILINE)
    assert re.search(r"^fused_policy +cuda +2 bytes +small +triton, cuda$", printed, re.MULTILINE)
    assert "nothing has been measured" not in printed


def test_the_command_alone_prints_its_help_and_its_version(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: rlkernels") and "doctor" in printed and "demo" in printed
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"rlkernels {rlkernels.__version__}\n"
    with pytest.raises(SystemExit) as done:
        main(["doktor"])
    assert done.value.code == 2


def test_the_package_is_a_command_of_python():
    program = [sys.executable, "-m", "rlkernels", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(Path(rlkernels.__file__).resolve().parents[1])}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"rlkernels {rlkernels.__version__}\n"


def test_doctor_prints_one_object_of_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    state = rlkernels.available_backends()
    assert found["serves"] == state["serves"] and found["absent"] == state["absent"]
    assert found["machine"]["torch"] == torch.__version__ and found["environment"].keys() == doctor.ENVIRONMENT.keys()
    assert found["advice"].keys() >= state["absent"].keys() and "check" not in found


def test_doctor_says_what_to_do_about_a_package_that_is_absent(capsys, monkeypatch):
    monkeypatch.setattr(machine, "version", lambda package: None if package == "trl" else "1.0")
    main(["doctor", "--plain"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("trl ") and "not installed" not in x)
    assert how("demo") in line


def test_doctor_checks_every_backend_against_float64(capsys):
    assert main(["doctor", "--check", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)["check"]
    present = {name for name in DEVICES["cpu"] if absent(name) is None}
    assert {x["backend"] for x in verdicts if x["device"] == "cpu"} >= present
    assert {x["function"] for x in verdicts} == {case[0] for case in self_test.CASES} | {"gae"}
    assert all(x["passed"] and x["error"] <= x["bound"] for x in verdicts)


def of_one_percent_more(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.01


@pytest.mark.parametrize("case", self_test.CASES, ids=lambda case: case[0])
@pytest.mark.parametrize("change", ["a percent more", "an error"])
def test_a_wrong_number_or_an_error_fails_the_check(case, change, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the driver is gone")

    name, ours, *rest = case
    changed = (name, of_one_percent_more(ours) if change == "a percent more" else broken, *rest)
    monkeypatch.setattr(self_test, "CASES", (changed,))
    monkeypatch.setattr(self_test, "BOUNDS", {torch.float32: self_test.BOUNDS[torch.float32]})
    assert main(["doctor", "--check", "--plain"]) == 1
    printed = capsys.readouterr().out
    assert ("WRONG" if change == "a percent more" else "RuntimeError: the driver is gone") in printed
    assert f"{len(DEVICES['cpu'])} WRONG" in printed or "1 WRONG" in printed


def test_what_doctor_prints_is_what_is_chosen(monkeypatch):
    monkeypatch.setattr(measured_order, "TABLE", {("fused_policy", "cuda", 2, "large"): ("cuda",)})
    order = DEVICES["cuda"]
    assert measured_order.preferred("fused_policy", "cuda", torch.bfloat16, 151936, order) == (
        "cuda",
        "triton",
        "eager",
    )
    for op, dtype, vocab in (
        ("token_stats", torch.bfloat16, 151936),
        ("fused_policy", torch.float32, 151936),
        ("fused_policy", torch.bfloat16, 32000),
    ):
        assert measured_order.preferred(op, "cuda", dtype, vocab, order) == order


def test_plain_tables_align_numbers_right_and_words_left():
    assert tables.text("T", ["what", "ms"], [["a", "1.5"], ["bcd", "12.5"]]) == (
        "\nT\nwhat    ms\n----  ----\na      1.5\nbcd   12.5\n"
    )


@pytest.mark.parametrize("page", ["README.md", "docs/migration.md"])
def test_the_program_of_a_page_for_a_model_of_transformers_runs(page):
    transformers = pytest.importorskip("transformers")
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "hidden_and_head(" in block]
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    input_ids = torch.randint(97, (2, 5))
    names = {"model": transformers.LlamaForCausalLM(config), "input_ids": input_ids, "old": None}
    names |= {"attention_mask": torch.ones_like(input_ids), "advantages": torch.ones(2, 1)}
    exec(block, names)
    # Every ratio is 1, and so is every advantage.
    assert "logprobs" not in names or names["logprobs"].shape == (2, 4)
    torch.testing.assert_close(names["loss"], torch.tensor(-1.0))
