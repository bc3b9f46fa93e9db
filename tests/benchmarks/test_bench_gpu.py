"""``python -m benchmarks --device cuda`` on a stand-in for the device: the protocol, the judge, the file that grows and
what is told.
"""

import argparse
import json
import statistics
import time

import pytest
import torch

import rlkernels
from benchmarks import __main__ as command
from benchmarks import run_gpu
from benchmarks.__main__ import main
from benchmarks.cases import columns_gpu, logits, logits_gpu
from benchmarks.cases.case import COMPILED, EAGER, Case
from benchmarks.cases.linear_gpu import NAMES as LINEAR
from benchmarks.problems.logits import copies_needed
from benchmarks.report import gpu as gpu_report
from benchmarks.report import plots
from benchmarks.timing import device as gpu_device
from benchmarks.timing import gpu as timing
from benchmarks.timing.contender import Contender


class Device:
    """A device whose clock advances by what each entry says it costs; everything else is the CPU."""

    name, device, cache_bytes = "Stand-in 9000", torch.device("cpu"), 2**12

    def __init__(self):
        self.now, self.synchronized, self.lost = 0.0, 0, False
        self.order = []  # of what must not come in any

    def event(self):
        self.order.append("event")
        return self.now

    def seconds(self, start, stop):
        return stop - start + 1e-4

    def busy(self):
        self.order.append("busy")

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.synchronized += 1

    def peak(self, function):
        function()
        return 4096

    def launches(self, function):
        self.order.append("profiled")
        function()
        return {"kernels": 2, "copies": 1, "fills": 0}

    def graph(self, function):
        return function

    def release(self):
        pass

    def state(self):
        return {"driver_version": "1.2", "clocks.sm": "1980"}

    def describe(self):
        return {"name": self.name, "state": self.state()}


def entry(device, name, cost, log=None, **rest):
    def run(state):
        device.now += cost
        if log is not None:
            log.append((name, state))

    return Contender(name, run, lambda buffer: buffer, **rest)


def arguments(*more):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(
        [
            "--device",
            "cuda",
            "--tokens",
            "32",
            "--vocab",
            "131",
            "--seconds",
            "0.001",
            "--no-compile",
            "--no-peers",
            "--plain",
            *more,
        ]
    )


def run(*more, device=None):
    return run_gpu.run(arguments(*more), device or Device(), small=128, size=2**14, side=16)


def test_the_race_alternates_and_takes_the_next_buffer_each_time():
    device, log = Device(), []
    entries = [entry(device, name, 0.01, log) for name in "AB"]
    timing._rounds(device, entries, "samples", 3, 0.05, lambda: False)
    assert "".join(name for name, _ in log) == "AB" * timing.LEAST
    assert [buffer for _, buffer in log] == [k % 3 for k in range(2 * timing.LEAST)]


def test_a_fast_entry_runs_until_its_seconds_are_over_and_no_more_than_the_most():
    device = Device()
    slow, fast, endless = entry(device, "slow", 1.0), entry(device, "fast", 0.01), entry(device, "endless", 0.0)
    timing._rounds(device, [slow, fast, endless], "samples", 1, 0.5, lambda: False)
    assert len(slow.samples) == timing.LEAST and len(endless.samples) == timing.MOST
    assert 0.5 <= sum(fast.samples) < 0.7


def test_cold_runs_find_an_empty_queue_and_an_overwritten_cache_outside_the_clock():
    device, flush = Device(), torch.ones(8, dtype=torch.uint8)
    e = entry(device, "A", 0.01)
    timing.race(device, [e], 1, 0.02, flush)
    assert len(e.samples) == timing.LEAST and len(e.cold) == timing.LEAST
    assert flush.sum() == 0 and device.synchronized > timing.LEAST
    assert statistics.median(e.cold) == pytest.approx(0.01 + 1e-4)


class Queue(Device):
    """A device with a queue: the host enqueues in its own time, and an event passes when all before it is done."""

    CALL, KERNEL = 100e-6, 30e-6

    def __init__(self):
        super().__init__()
        self.host, self.free = 0.0, 0.0

    def event(self):
        self.host += 1e-6
        self.free = max(self.free, self.host)
        return self.free

    def busy(self):
        self.free = max(self.free, self.host) + 2e-3

    def synchronize(self):
        self.host = max(self.host, self.free)

    def seconds(self, start, stop):
        return stop - start

    def run(self, state):
        self.host += self.CALL
        self.free = max(self.free, self.host) + self.KERNEL


def test_no_run_times_the_host_where_a_call_costs_it_more_than_the_device():
    device = Queue()
    entries = [Contender(name, device.run) for name in "ABC"]
    timing.race(device, entries, 2, 0.002, torch.ones(8, dtype=torch.uint8))
    for e in entries:
        assert len(e.samples) > timing.LEAST and len(e.cold) >= timing.LEAST
        assert max(e.samples + e.cold) == pytest.approx(Queue.KERNEL, abs=2e-6), e.name


def test_nothing_is_timed_behind_the_profiler_and_torch_compile_comes_last(monkeypatch, tmp_path):
    from benchmarks.cases import logits_gpu as cases

    made = []
    whole = cases.CASES[logits.LOGPROBS]
    monkeypatch.setitem(
        cases.CASES, logits.LOGPROBS, lambda p, j, lineup: made.append(lineup.compile_too) or whole(p, j, lineup)
    )
    monkeypatch.setattr(run_gpu.libraries, "lineup", fake_lineup(run_gpu.libraries.lineup))
    device, file = Device(), tmp_path / "bench.json"
    args = arguments("--case", logits.LOGPROBS, "--case", "dpo_loss", "--json", str(file))
    args.no_compile = False
    assert run_gpu.run(args, device, small=128, size=2**14, side=16) == 0
    assert made == [False, True, False], "timed, with torch.compile, counted"
    assert "event" not in device.order[device.order.index("profiled") :]
    cases = json.loads(file.read_text())["cases"]
    for case in cases:
        names = [e["name"] for e in case["entries"]]
        assert names[-1] == COMPILED and names.count(COMPILED) == 1
        assert all(e["launches"]["kernels"] == 2 for e in case["entries"] if e["name"] != COMPILED)


def fake_lineup(make):
    """torch.compile stands for plain torch: what is compiled is not the question."""

    def lineup(*arguments):
        made = make(*arguments)
        made.torch = lambda f: {EAGER: f, **({COMPILED: f} if made.compile_too else {})}
        return made

    return lineup


def test_torch_compile_leaves_seconds_of_the_budget_for_the_count_of_launches(tmp_path, monkeypatch):
    args, file = arguments("--case", "dpo_loss", "--budget", "10", "--json", str(tmp_path / "bench.json")), tmp_path
    args.no_compile = False
    assert run_gpu.run(args, Device(), small=128, size=2**14, side=16) == 0
    data = json.loads((file / "bench.json").read_text())
    assert data["not_measured"] == ["dpo_loss, torch.compile: the budget of 10 s was spent"]
    assert data["cases"][0]["entries"][0]["launches"]


def test_the_fused_head_comes_before_the_small_cases(monkeypatch):
    seen = []
    monkeypatch.setattr(run_gpu.Run, "batch", lambda self, names, *rest: seen.append(names[0]))
    assert run("--headline") == 0
    assert seen.index(LINEAR[0]) < seen.index("policy_loss") < len(seen)


def test_buffers_are_four_caches_in_total():
    assert copies_needed(2048 * 32000 * 2, 50 * 2**20) == 2
    assert copies_needed(8192 * 151936 * 2, 50 * 2**20) == 1
    assert copies_needed(17 * 64 * 4096, 50 * 2**20) == 48


def test_launches_are_counted_by_kind_without_the_profilers_own_ranges():
    names = [
        "token_stats",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "vectorized_elementwise",
        "## Call CompiledFxGraph abc ##",
    ]
    assert gpu_device.count_launches(names) == {"kernels": 2, "copies": 1, "fills": 1}
    assert gpu_device.count_launches([]) is None


def test_driver_and_clocks_are_read_from_one_line_of_the_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.159.04, 1980, 3201, 1980, 412.5, 700.00, 41'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_device.smi(0) == {
        "driver_version": "580.159.04",
        "clocks.sm": "1980",
        "clocks.mem": "3201",
        "clocks.max.sm": "1980",
        "power.draw": "412.5",
        "power.limit": "700.00",
        "temperature.gpu": "41",
    }
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_device.smi(0) == {}
    tool.unlink()
    assert gpu_device.smi(0) == {}


def test_the_peak_is_what_the_allocator_held_above_its_level_before(monkeypatch):
    cuda, level = object.__new__(gpu_device.Cuda), {"now": 100, "most": 900}
    cuda.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: level.update(most=level["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: level["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: level["most"])
    assert cuda.peak(lambda: level.update(most=170)) == 70


def test_the_hosts_time_is_from_call_to_return_on_an_empty_queue():
    device, order = Device(), []
    device.synchronize = lambda: order.append("synchronized")

    def prepare(buffer):
        time.sleep(0.02)
        order.append("prepared")

    took = gpu_device.host_seconds(device, lambda state: order.append("ran"), prepare, runs=3)
    assert order[:6] == ["prepared", "synchronized", "ran"] * 2 and took < 0.01


def test_a_floor_is_the_larger_of_moving_and_computing():
    roof = timing.Roofline(read=100.0, copy=80.0, matmul=10.0)
    assert roof.reading == 100.0 and timing.Roofline(50.0, 80.0, 1.0).reading == 80.0
    assert Case("", [], reads=200).floor(roof) == 2.0
    assert Case("", [], reads=80, writes=80).floor(roof) == 2.0
    assert Case("", [], reads=80, writes=80, flops=50).floor(roof) == 5.0


def test_the_command_writes_every_case_judges_it_and_draws(tmp_path, capsys, monkeypatch):
    # Once, not thirty times.
    monkeypatch.setattr(timing, "host_seconds", lambda device, run, prepare: len([run(prepare(0))]) * 1e-5)
    file = tmp_path / "bench.json"
    wanted = [logits.STATS, logits.LOGPROBS, logits.POLICY, logits_gpu.TWO_BOTH, *run_gpu.SMALL, *LINEAR]
    pictures = ["--plot", str(tmp_path / "pictures")] if bench_gpu_plots_work() else []
    assert (
        run("--json", str(file), "--commit", "abc", *pictures, *(x for name in wanted for x in ("--case", name))) == 0
    )
    printed, data = capsys.readouterr().out, json.loads(file.read_text())
    assert data["complete"] and not data["not_measured"] and data["device"]["name"] == Device.name
    measured = [c["name"].split(" [")[0] for c in data["cases"]]
    assert measured == [*wanted[:4], *LINEAR, "policy_loss", "pairwise_reward_loss", "dpo_loss", "gae", "gae"]
    for case in data["cases"]:
        assert case["faults"] == [] and case["floor_s"] > 0 and case["state"]["driver_version"] == "1.2"
        assert {e["name"] for e in case["entries"]} >= {"rlkernels auto", EAGER}
        for e in case["entries"]:
            assert (
                not e["failed"]
                and e["hot"]["runs"] >= timing.LEAST
                and e["peak_bytes"] == 4096
                and e["launches"]["kernels"] == 2
            )
            assert e["of_floor"] == pytest.approx(case["floor_s"] / e["hot"]["median_s"]) and e["errors"]
            assert e["name"] in printed
    assert {"read", "copy", "matmul"} <= set(data["roofline"])
    assert len(data["sources"]["triton_sha256"]) == 64 and data["sources"]["commit"]
    assert not pictures or (tmp_path / "pictures" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def bench_gpu_plots_work():
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def test_one_percent_of_error_fails_the_command(monkeypatch, capsys):
    true = rlkernels.token_logprobs
    monkeypatch.setattr(rlkernels, "token_logprobs", lambda *a, **k: true(*a, **k) * 1.01)
    assert run("--case", logits.LOGPROBS) == 1
    printed = capsys.readouterr().out
    assert "rlkernels auto: error of logp" in printed and "rlkernels auto: error of gradient" in printed


def test_one_of_ours_that_fails_is_a_fault_and_the_others_are_measured(monkeypatch, tmp_path):
    def broken(*a, **k):
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setattr(rlkernels, "gae", broken)
    file = tmp_path / "bench.json"
    assert run("--case", "gae", "--json", str(file)) == 1
    case = json.loads(file.read_text())["cases"][0]
    assert any("failed: RuntimeError: no kernel image" in f and "second line" not in f for f in case["faults"])
    assert next(e for e in case["entries"] if e["name"] == EAGER)["hot"]


def test_an_interrupted_run_keeps_the_cases_that_ended(monkeypatch, tmp_path):
    def interrupted(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(columns_gpu, "dpo", interrupted)
    file = tmp_path / "bench.json"
    assert run("--case", "pairwise_reward_loss", "--case", "dpo_loss", "--json", str(file)) == 130
    data = json.loads(file.read_text())
    assert [c["name"].split(" ")[0] for c in data["cases"]] == ["pairwise_reward_loss"] and data["complete"] is False
    assert not list(tmp_path.glob("*.part"))


def test_a_spent_budget_leaves_cases_out_by_name(tmp_path):
    file = tmp_path / "bench.json"
    run("--budget", "0.000001", "--case", logits.STATS, "--case", "dpo_loss", "--json", str(file))
    data = json.loads(file.read_text())
    assert data["cases"] == [] and [line.split(":")[0] for line in data["not_measured"]] == [
        f"{logits.STATS} [32, 131]",
        "dpo_loss",
    ]


def test_a_peer_that_loses_the_device_ends_the_run_with_what_it_has(monkeypatch, tmp_path):
    device, make = Device(), columns_gpu.dpo

    def with_a_bad_peer(*a, **k):
        case = make(*a, **k)

        def illegal(state):
            device.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        case.contenders.append(Contender("bad peer", illegal))
        return case

    monkeypatch.setattr(columns_gpu, "dpo", with_a_bad_peer)
    file = tmp_path / "bench.json"
    assert run("--case", "pairwise_reward_loss", "--case", "dpo_loss", "--json", str(file), device=device) == 3
    data = json.loads(file.read_text())
    assert len(data["cases"]) == 1 and "bad peer left the device unusable" in data["not_measured"][0]


def test_peers_that_err_or_fail_are_shown_with_a_remark():
    good, coarse = (
        Contender("p", None, errors={"logp": 1e-5, "gradient": 2e-3, "rounding": 1.6e-3}),
        Contender("p", None, errors={"logp": 0.05}),
    )
    assert gpu_report.remark(good) == "" and gpu_report.remark(coarse) == "other numbers: logp 5.0e-02"
    assert "nan" in gpu_report.remark(Contender("p", None, errors={"logp": float("nan")}))
    failed = gpu_report.record(
        Case("c", [Contender("p", None, failed=True, remark="out of memory")], passes="1R", reads=1),
        timing.Roofline(1, 1, 1),
    )["entries"][0]
    assert gpu_report.row(failed, 1.0)[-1] == "out of memory"


def case_record(name, shape, times, floor, launches=None):
    return {
        "name": name,
        "shape": shape,
        "reads_bytes": 100,
        "writes_bytes": 0,
        "floor_s": floor,
        "entries": [
            {"name": n, "hot": {"median_s": t}, "of_floor": floor / t, "peak_bytes": 50, "launches": launches}
            for n, t in times.items()
        ],
    }


def test_goals_take_the_worst_shape_and_say_what_was_not_measured():
    cases = [
        case_record(logits.STATS, [8192, v], {"rlkernels auto": 1.0, "TRL kernel": trl}, 0.95)
        for v, trl in ((1, 1.5), (2, 1.1))
    ]
    cases.append(
        case_record(
            "policy_loss [64, 2048] forward+backward",
            [64, 2048],
            {"rlkernels auto": 1.0, "torch eager": 12.0},
            0.1,
            {"kernels": 3, "copies": 0, "fills": 0},
        )
    )
    found = {g["text"]: (g["worst"], g["met"]) for g in gpu_report.goals(cases)}
    assert found["token_stats forward, share of read bandwidth"] == (pytest.approx(0.95), True)
    assert found["token_stats forward, times faster than TRL's kernel"] == (1.1, False)
    assert found["policy_loss, times faster than torch eager"] == (12.0, True) and found[
        "policy_loss, launches forward+backward"
    ] == (3, True)
    assert found["logits_policy_loss, time over the 1R+1W floor"] == (None, None)


def test_the_loop_of_the_trainers_is_the_recurrence():
    r, v = torch.tensor([[0.0, 7.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    advantages, returns = columns_gpu.gae_loop(r, v, torch.tensor([[True, False, True]]), 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.0, 0.5]] and returns.tolist() == [[1.0, 0.0, 1.0]]


def test_pictures_are_drawn_from_the_json_alone(tmp_path):
    if not bench_gpu_plots_work():
        pytest.skip("matplotlib is not installed")
    grid = [(t, v) for t in (2048, 8192) for v in (32000, 151936)]
    cases = [
        {
            **case_record(
                "c",
                list(s),
                {"rlkernels auto": 1e-9 * s[0] * s[1], "torch eager": 1e-8 * s[0] * s[1]},
                5e-10 * s[0] * s[1],
            ),
            "passes": "1R",
        }
        for s in grid
    ]
    drawn = plots.draw({"cases": cases, "device": {"name": "x"}, "dtype": "bf16"}, tmp_path)
    assert sorted(p.name for p in drawn) == ["against_rows.png", "against_vocabulary.png", "roofline.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)


def test_without_a_device_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    assert main(["--device", "cuda", "--quick"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_case_of_the_other_device_is_refused_by_name(capsys):
    assert main(["--device", "cpu", "--case", "gae"]) == 2
    assert "--device cpu has no case 'gae'" in capsys.readouterr().err
