"""The cost model, the page that prints it, and the fit of time against tokens and vocabulary."""

import math
import re
import runpy

import pytest
import subprocesses
from paths import ROOT

SCALING = runpy.run_path(str(ROOT / "benchmarks/scaling/fit.py"))
MODEL = runpy.run_path(str(ROOT / "benchmarks/scaling/cost_model.py"))
PAGE = ROOT / "docs/scaling.md"
Case, Machine = MODEL["Case"], MODEL["Machine"]


def test_a_line_is_found_exactly_and_a_curve_is_told_by_its_largest_deviation():
    work = [float(t * v) for t in (1, 2, 4, 8) for v in (3, 5, 9)]
    line = SCALING["fit"](work, [0.25 + 0.125 * w for w in work])
    assert math.isclose(line.a, 0.25, rel_tol=1e-9) and math.isclose(line.b, 0.125, rel_tol=1e-9)
    assert line.r2 > 1 - 1e-12 and abs(line.worst) < 1e-9
    curve = SCALING["fit"](work, [0.25 + 0.125 * w**1.5 for w in work])
    assert abs(curve.worst) > 0.2 and curve.r2 < 0.99


def test_an_outlier_is_reported_with_its_sign():
    work = [float(w) for w in range(1, 21)]
    for factor in (0.5, 2.0):
        times = [2.0 + 3.0 * w for w in work]
        times[7] *= factor
        assert math.copysign(1, SCALING["fit"](work, times).worst) == (1 if factor > 1 else -1)


def test_the_quick_run_prints_a_fit_that_grows_with_tokens_times_vocabulary():
    done = subprocesses.child(ROOT / "benchmarks/scaling/fit.py", "--quick", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(
        r"fit: time = (-?[\d.]+) ms \+ ([\d.]+) ps x T V H, R\^2 (-?[\d.]+), largest deviation "
        r"([+-][\d.]+)%",
        done.stdout,
    )
    assert found, done.stdout
    _, slope, r2, _ = map(float, found.groups())
    assert slope > 0 and r2 <= 1, done.stdout
    smallest = re.search(r"^ +128 +([\d.]+) \(", done.stdout, re.MULTILINE)
    largest = re.search(
        r"T 512, V 8000, left out of the fit: predicted [\d.]+ ms, measured ([\d.]+) ms, ratio "
        r"[\d.]+",
        done.stdout,
    )
    # 16 times the work. A loose bound: other processes share the machine.
    assert float(largest[1]) > 2 * float(smallest[1]), done.stdout


def test_the_tables_of_the_page_are_those_of_the_model():
    assert MODEL["table"](MODEL["CASES"], Machine()) in PAGE.read_text(), (
        "run: python benchmarks/scaling/cost_model.py, and paste it into docs/scaling.md"
    )


def test_the_share_of_the_products_on_the_page_is_that_of_the_model_and_no_lower_than_it_was():
    assert MODEL["shares"](MODEL["CALLS"], Machine()) in PAGE.read_text()
    for (tokens, vocab, budget), least in zip(MODEL["CALLS"], (0.84, 0.88, 0.86, 0.89, 0.87, 0.91), strict=True):
        stretches, share = MODEL["by_tiles"](tokens, vocab, 4096, budget, Machine())
        assert sum(map(sum, stretches)) == tokens and least <= share < 1, (tokens, budget, share)


def test_the_model_charges_the_same_products_whichever_way_the_head_is_cut():
    on = Machine()
    for tokens, vocab in ((2**16, 128256), (2**20, 151936)):
        tokens_cut, vocabulary_cut = (Case(tokens, vocab, sharded=sharded) for sharded in (False, True))
        assert math.isclose(
            MODEL["seconds"](tokens_cut, on)["products"], MODEL["seconds"](vocabulary_cut, on)["products"], rel_tol=1e-4
        )
        assert math.isclose(
            MODEL["seconds"](tokens_cut, on)["products"], 6 * tokens * vocab * 4096 / 8 / 790e12, rel_tol=1e-12
        )


@pytest.mark.parametrize(("gathers", "there"), [(2, True), (3, True), (2, False)])
def test_the_links_break_even_where_the_model_says(gathers, there):
    vocab, hidden, n = 128256, 4096, 8
    tokens = MODEL["break_even"](vocab, gathers, there)
    dense = gathers * 2 * hidden * vocab
    sharded = tokens * hidden * (8 if there else 10)
    assert math.isclose(dense, sharded, rel_tol=1e-12)
    # The links of the model itself, but for the latencies and the few numbers of the forward.
    if (gathers, there) == (2, True):
        on = Machine(latency=0.0)
        links = [
            sum(
                v
                for k, v in MODEL["seconds"](Case(int(tokens), vocab, hidden, n, sharded, numbers=0), on).items()
                if "link" in k
            )
            for sharded in (False, True)
        ]
        assert math.isclose(*links, rel_tol=1e-3)
    assert {0.5: "`N < V/2`", 0.75: "`0.75 V`", 0.4: "`0.4 V`"}[round(tokens / vocab, 2)] in PAGE.read_text()


def test_a_chunk_of_the_model_is_a_chunk_of_the_library():
    """A head over ranks plans for the whole vocabulary and no waves, and keeps the gradient of one chunk."""
    for case in MODEL["CASES"]:
        chunk, stretch = case.largest
        assert sum(map(sum, case.stretches)) == case.rows
        assert (4 * chunk + 2 * stretch) * (case.columns + 16) <= case.budget
        assert chunk == stretch if case.sharded else stretch >= 1920
