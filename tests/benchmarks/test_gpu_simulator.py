"""The simulator of a multiprocessor on loops by hand, whose answers are arithmetic."""

import pytest

from benchmarks.gpu_model import rows, sass, simulator
from benchmarks.gpu_model.machine import SLOW, resident_blocks
from benchmarks.gpu_model.simulator import Case, Phase, Step


def step(pipe=2, cycles=1, kind=simulator.PLAIN, of=0.0, stall=1, writes=7, waits=0, latency=12):
    return Step(pipe, cycles, latency, stall, writes, 7, waits, kind, 0, of)


@pytest.fixture(scope="module")
def run(pytestconfig):
    if simulator.CXX is None:
        pytest.skip("no C++ compiler: the simulator cannot be built")
    folder = pytestconfig.cache.mkdir("gpu_model")

    def one(steps, times, warps=8, blocks=2, rate=20.0, latency=1000, hits=0.0, start=0):
        phase = Phase(tuple(steps), times, 0, hits)
        (found,) = simulator.simulate([Case(blocks, warps, 8, rate, latency, 100, start, (phase,))], folder)
        return found

    return one


def test_enough_loads_in_flight_take_the_whole_of_the_memory(run):
    load = step(kind=simulator.LOAD, of=512.0, writes=0)
    assert run([load, step(waits=1)], 200, warps=32).rate == pytest.approx(20.0, rel=0.02)


def test_a_load_at_a_time_is_bounded_by_what_is_in_flight(run):
    load = step(kind=simulator.LOAD, of=512.0, writes=0)
    found = run([load, step(waits=1)], 200, warps=4, blocks=1)
    assert found.rate == pytest.approx(4 * 512 / 1000, rel=0.15), "four loads per latency"
    near = run([load, step(waits=1)], 200, warps=4, blocks=1, hits=1.0)
    assert near.rate == 0 and near.issue > 5 * found.issue, "what the cache serves is not moved, and is there sooner"


def test_arithmetic_is_bounded_by_the_issue_or_by_its_pipe(run):
    load = step(kind=simulator.LOAD, of=512.0)
    full = run([load, *[step(pipe=simulator.FMA)] * 200], 40)
    assert full.issue == pytest.approx(1.0, abs=0.05) and full.rate == pytest.approx(4 * 512 / 201, rel=0.06)
    slow = run([load, *[step(pipe=3, cycles=8)] * 50], 40)
    assert slow.rate == pytest.approx(4 * 512 / 401, rel=0.06), "MUFU: a warp in eight clocks"


def test_the_beginning_of_a_block_is_seen_where_few_run(run):
    body = [step(kind=simulator.LOAD, of=512.0), *[step()] * 60]
    assert run(body, 20, blocks=1, start=3000).rate < 0.7 * run(body, 20, blocks=1).rate


def test_a_part_of_a_pass_moves_that_part_and_waits_for_what_it_left_out():
    loads = [step(kind=simulator.LOAD, of=512.0, writes=k) for k in range(4)]
    body = (*loads, *[step(waits=1 << k) for k in range(4) for _ in range(5)])
    half = simulator.part(body, 0.55)
    assert sum(s.bytes for s in half) == pytest.approx(0.55 * 4 * 512)
    assert sum(s.kind == simulator.LOAD for s in half) == 3 and len(half) == 3 + 11
    together = 0
    for s in half:
        together |= s.waits
    assert together == 0b1111


def test_a_control_word_is_read_as_the_compiler_wrote_it():
    text = """
		Function : _ZN3rlk1aEv
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402047981 */
                                                                      /* 0x000ea8000c1e1d00 */
        /*0010*/                   DEPBAR.LE SB0, 0x1 ;               /* 0x000080400000791a */
                                                                      /* 0x004fe20000000000 */
"""
    load, wait = map(simulator.step, sass.parse(text)["_ZN3rlk1aEv"])
    assert (load.stall, load.writes, load.reads, load.waits) == (4, 2, 7, 0)
    assert load.kind == simulator.LOAD and load.bytes == 512
    assert (wait.kind, wait.operand, wait.stall, wait.waits) == (simulator.WAIT_GROUPS, 1, 1, 0b100)


def test_blocks_on_a_multiprocessor_are_those_of_the_scarcest():
    assert resident_blocks(32, 256, 1024) == 8, "threads"
    assert resident_blocks(75, 256, 1024) == 3, "registers, by 256 per warp"
    assert resident_blocks(40, 128, 100 * 1024) == 2, "shared memory"
    assert resident_blocks(16, 32, 0) == 32, "blocks"


def test_a_second_sweep_finds_what_still_lies_in_the_cache():
    assert rows.cache_hits(1, 1000, 2, 2, SLOW) == 1.0
    few, many = (rows.cache_hits(n, 151936, 2, 2, SLOW) for n in (132, 396))
    assert few == pytest.approx(3 * many) and 0.05 < many < 0.3
