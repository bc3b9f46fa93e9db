"""The plan of a head's chunks on an accelerator, as arithmetic. Its costs are a model: nothing here runs on a GPU."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from rlkernels.linear import chunk_plan, chunking
from rlkernels.linear import head as heads
from rlkernels.linear.chunk_plan import HeadShape, full_chunks, planned_stretches, waste

VOCABULARIES = (32000, 128256, 151936, 262144)
# A power of 2, thrice one, and the odd sizes of published models.
HIDDEN = (1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
# Of accelerators with such tiles: A100 is 108, H100 and H200 are 132, B200 is 148.
MULTIPROCESSORS = (80, 108, 132, 148)
GIB = 2**30


def todays_chunks(rows, limit):
    """The chunks before there was a plan: as many rows as the budget holds, and the rest."""
    return tuple((min(limit, rows - start),) for start in range(0, rows, limit))


def limit_of(vocab, budget=GIB):
    """Rows of fp32 logits and of their bf16 gradient."""
    return chunking.rows_within(budget, 6 * (vocab + 16))


def shapes():
    return [HeadShape(*x) for x in itertools.product(VOCABULARIES, HIDDEN, MULTIPROCESSORS)]


def tokens(count, seed, low=4096, high=65536):
    draw = random.Random(seed)
    return [draw.randint(low, high) for _ in range(count)]


def chunks_of(stretches):
    return [size for stretch in stretches for size in stretch]


def test_the_ticks_are_those_that_one_counts_by_hand():
    shape, limit = HeadShape(151936, 4096, 132), limit_of(151936)
    assert limit == 1168
    # 10 x 594 tiles in 45 waves; 160 tiles, of a quarter of the depth in 5 waves; 18992 tiles in 144 waves.
    full = 45 * 4096 + 5 * (151936 // 4 + chunk_plan.SLICE_TICKS) + 144 * 1168
    # 594 tiles in 5 waves, but bytes take longer: those of the weight 184 rows, those of its gradient 736.
    tail = (2 * 184 + 736) * 151936 * 4096 / (128 * 256 * 132)
    assert chunk_plan.ticks(full_chunks(8192, limit), shape) == pytest.approx(7 * full + tail)
    ideal = 3 * 8192 * 151936 * 4096 / (128 * 256 * 132)
    assert waste(full_chunks(8192, limit), shape) == pytest.approx((7 * full + tail) / ideal - 1)
    # 8 x 594 tiles in 36 waves, 128 tiles in one.
    one = 36 * 4096 + 151936 + 144 * 1024
    assert chunk_plan.ticks(((1024,),) * 8, shape) == 8 * one
    # Logits in fours of 4 x 594 tiles in 18 waves, 256 tiles in 2.
    four = 4 * 18 * 4096 + 2 * 151936 + 144 * 2048
    assert chunk_plan.ticks(((512,) * 4,) * 4, shape) == 4 * four


@pytest.mark.parametrize("budget", [GIB, None], ids=["1 GiB", "the default"])
def test_the_waste_of_tiles_and_waves_is_small_on_every_device(budget):
    found = [
        (waste(planned_stretches(rows, limit_of(shape.vocab, _budget(shape, budget)), shape, True), shape), rows, shape)
        for shape in shapes()
        for rows in [4096, 8192, 16384, 32768, 65536, *tokens(8, seed=0)]
    ]
    assert sum(share for share, *_ in found) / len(found) <= 0.04
    assert max(found)[0] <= 0.12, max(found)


def _budget(shape, budget):
    return chunking.budget_bytes(budget, "cuda", 4 * shape.hidden * shape.vocab)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("rows", [8192, 32768])
def test_on_132_multiprocessors_hardly_anything_is_wasted(rows, keeps):
    shape = HeadShape(151936, 4096, 132)
    limit = limit_of(151936)
    assert waste(planned_stretches(rows, limit, shape, keeps), shape) <= 0.03 < waste(todays_chunks(rows, limit), shape)


def test_no_plan_takes_longer_than_that_of_before():
    for shape in shapes():
        limit = limit_of(shape.vocab)
        # Beside the ends of chunks, where a tail of few rows costs little or much.
        ends = [limit * n + more for n in (1, 2, 5) for more in (-1, 0, 1, 16, 100, 700)]
        for rows, keeps in itertools.product([*tokens(4, 1), *tokens(2, 2, 1, 4096), *ends], (False, True)):
            before, now = todays_chunks(rows, limit), planned_stretches(rows, limit, shape, keeps)
            if waste(now, shape) > waste(before, shape):
                # Only where the sum of the weight's gradient is read and written less often.
                assert len(now) < len(before), (rows, shape, keeps)
                assert chunk_plan.cost(now, shape) < chunk_plan.cost(before, shape)


def test_chunks_are_equal_multiples_of_a_tile_without_a_tail_of_few_rows():
    as_before = plans = 0
    for shape, budget in itertools.product(shapes(), (GIB, None)):
        limit = limit_of(shape.vocab, _budget(shape, budget))
        for rows in [4096, 8192, 32768, *tokens(6, 3)]:
            stretches = planned_stretches(rows, limit, shape, True)
            sizes, lengths = chunks_of(stretches), [sum(x) for x in stretches]
            plans += 1
            if stretches == todays_chunks(rows, limit):
                as_before += len(stretches) > 1
                assert sizes[-1] >= 256, (stretches, shape)
                continue
            assert not any(x % 128 for x in sizes[:-1])
            assert all(max(x) - min(x) <= 128 + 127 for x in (sizes, lengths)), (stretches, shape)
            assert 2 * min(sizes) >= max(sizes) and 2 * min(lengths) >= max(lengths), (stretches, shape)
    # Of 32,000 columns 1 GiB holds 5584 rows, which fill 43.6 tiles.
    assert as_before <= 0.02 * plans


def test_a_gib_of_the_largest_vocabularies_adds_to_the_weight_every_2048_rows():
    shape = HeadShape(151936, 4096, 132)
    assert planned_stretches(8192, 1168, shape, True) == ((512,) * 4,) * 4
    assert planned_stretches(8192, 1168, shape, False) == ((1024,),) * 8
    for vocab in VOCABULARIES[:3]:
        for rows in (4096, 8192, 32768, 65536):
            stretches = planned_stretches(rows, limit_of(vocab), HeadShape(vocab, 4096, 132), True)
            assert min(map(sum, stretches)) >= 1920, (vocab, rows, stretches)


@pytest.mark.parametrize("keeps", [False, True])
def test_any_budget_is_kept_and_every_row_is_in_one_chunk(keeps):
    draw = random.Random(4)
    for _ in range(400):
        limit, rows = 16 * draw.randint(1, draw.choice((8, 100, 700))), draw.randint(0, draw.choice((20, 3000, 70000)))
        shape = HeadShape(draw.choice((1, 133, *VOCABULARIES)), draw.choice((1, 16, 1000, 8192)), draw.choice((1, 132)))
        stretches = planned_stretches(rows, limit, shape, keeps)
        sizes = chunks_of(stretches)
        assert sum(sizes) == rows and all(x > 0 for x in sizes)
        if rows:
            filled = [16 * -(-x // 16) for x in (max(sizes), max(map(sum, stretches)))]
            assert 4 * filled[0] + 2 * filled[1] <= 6 * limit if keeps else filled[1] <= limit
        if rows <= limit:
            assert stretches == ((rows,),) * (rows > 0)
        if not keeps:
            assert all(len(x) == 1 for x in stretches)


def test_without_waves_the_chunks_are_as_few_as_fit():
    """Over a process group, and on a device whose multiprocessors are not known."""
    for limit, rows in ((1168, 8192), (1168, 20000), (5584, 30000), (400, 5000)):
        sizes = chunks_of(planned_stretches(rows, limit, HeadShape(151936, 4096, 1), False))
        assert len(sizes) <= -(-rows // (limit // 128 * 128 if limit >= 512 else limit)) and max(sizes) <= limit
        assert max(sizes) - min(sizes) <= 255


def test_the_default_adds_to_the_weight_every_4096_rows():
    shape = HeadShape(151936, 4096, 132)
    limit = limit_of(shape.vocab, _budget(shape, None))
    assert limit == 2720
    for rows in (4096, 8192, 32768):
        assert min(sum(x) for x in planned_stretches(rows, limit, shape, True)) >= 4096


def test_the_default_follows_the_sum_of_a_gradient_that_there_is(monkeypatch):
    monkeypatch.delenv("RLKERNELS_LOGITS_BUDGET", raising=False)
    sizes, dtype = ((9, 4096), (151936, 4096)), torch.bfloat16
    for device, trained, limit in (("meta", True, 2720), ("meta", False, 1168)):
        assert make_head(device, sizes, dtype, trained).chunk_rows == limit
        assert make_head(device, sizes, dtype, trained, logits_budget=GIB).chunk_rows == 1168
        with torch.no_grad():
            assert make_head(device, sizes, dtype, trained).chunk_rows == 1168
    assert make_head("cpu", ((9, 8), (128256, 8)), dtype, True).chunk_rows == 512


def make_head(device, sizes=((700, 8), (64, 8)), dtype=torch.float32, trained=False, **options):
    hidden, weight = (torch.empty(shape, device=device, dtype=dtype) for shape in sizes)
    operands = hidden, weight.requires_grad_(trained)
    given = dict.fromkeys(heads.HeadOptions.__annotations__) | {"temperature": 1.0, "logit_scale": 1.0}
    given |= {"ignore_index": -100, "logits_dtype": torch.float32, **options}
    targets = torch.zeros(len(hidden), dtype=torch.long, device=device)
    return heads.linear_head("linear_token_logprobs", *operands, targets, given)


def test_the_multiprocessors_are_those_of_a_device_that_is_here(monkeypatch):
    asked = chunking.multiprocessors.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: {1: properties}[device.index])
    assert asked(torch.device("cuda", 1)) == 148 and asked(torch.device("meta")) == asked(torch.device("xpu", 1)) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert asked(torch.device("cuda", 1)) == 1


def test_a_cpu_and_a_caller_who_counts_rows_have_the_chunks_of_before():
    budget = 48 * (64 + 16) * 4
    for device, options in (
        ("cpu", {"logits_budget": budget}),
        ("cpu", {"chunk_tokens": 100}),
        ("meta", {"chunk_tokens": 100}),
    ):
        head = make_head(device, **options)
        assert not head.planned
        assert head.stretches(700, True) == todays_chunks(700, 48 if "logits_budget" in options else 100)
    planned = make_head("meta", logits_budget=budget)
    assert planned.planned and max(planned.chunk_sizes(700)) <= 48 and 0 not in planned.chunk_sizes(700)
    assert planned.chunk_sizes(700) != chunks_of(todays_chunks(700, 48))
