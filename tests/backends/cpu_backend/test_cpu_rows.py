"""The native CPU backend at its own door: the protocol functions of ``backends/cpu.py``, judged against float64."""

from pathlib import Path

import pytest
import subprocesses
import torch
from flat_backend import Flat
from reference import (
    assert_gradient,
    assert_within_policy,
    cotangents,
    draw_rows,
    gradient_allowance,
    same_bits,
    statistics,
)

from rlkernels.backends import cpu
from rlkernels.backends.protocol import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = (
    "logp",
    "shift",
    "sum_exp",
    "entropy",
    "log_sum_sq_probs",
    "mean_logits",
    "is_top1",
    "ref_logp",
    "ref_shift",
    "ref_sum_exp",
    "kl",
)
ALL = ENTROPY | LOG_SUM_SQ | MEAN_LOGITS | IS_TOP1
# One column; a pair; less than a vector; around the block's fractions and no multiple of anything; a whole vocabulary
# of 2^k and of Llama 3.
SIZES = (1, 2, 7, 1023, 1024, 1025, 2053, 4096, 4097, 32000, 128256)


def stats(x, y, temperature=1.0, mask=None, ref=None, wanted=ALL):
    return dict(
        zip(
            NAMES,
            Flat(cpu).token_stats(x, y, temperature, -100, mask, ref, wanted | (KL if ref is not None else 0)),
            strict=True,
        )
    )


def backward(x, y, s, dlogp=None, dentropy=None, dkl=None, temperature=1.0, mask=None, ref=None, out=None):
    of_ref = (s["ref_shift"], s["ref_sum_exp"], s["kl"]) if ref is not None else (None,) * 3
    return Flat(cpu).token_stats_backward(
        dlogp, dentropy, dkl, x, y, temperature, -100, mask, ref, s["shift"], s["sum_exp"], s["entropy"], *of_ref, out
    )


def everything(x, y, **options):
    """Every output and every gradient at once, by name."""
    s = stats(x, y, **options)
    count = 3 if options.get("ref") is not None else 2
    return {**s, "gradient": backward(x, y, s, *cotangents(y.shape, count, dtype=s["logp"].dtype), **options)}


def assert_same(got, expected):
    for name, x in expected.items():
        assert same_bits(got[name], x), f"{name}: {got[name]} against {x}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_statistics_and_gradients_keep_the_error_policy(vocab, dtype):
    x, y, mask = draw_rows((5,), vocab, dtype, seed=vocab)
    cases = {"plain": {}, "temperature per token": {"temperature": torch.tensor([0.7, 1.0, 3.0, 0.3, 1.7])}}
    if vocab < 5000:
        ref = draw_rows((5,), vocab, dtype, seed=vocab + 1)[0]
        cases |= {
            "mask": {"mask": mask, "temperature": 0.7},
            "one mask": {"mask": mask[0].clone().index_fill(0, y.clamp(min=0), True)},
            "reference": {"ref": ref},
            "reference and mask": {"ref": ref, "mask": mask, "temperature": 1.3},
        }
    for case, options in cases.items():
        judge(case, x, y, **options)


def judge(case, x, y, temperature=1.0, mask=None, ref=None):
    s = stats(x, y, temperature, mask, ref)
    wide = x.double().requires_grad_()
    names = {
        "logprobs": "logp",
        "entropy": "entropy",
        "log_sum_sq_probs": "log_sum_sq_probs",
        "mean_logits": "mean_logits",
    }
    names |= {} if ref is None else {"ref_logprobs": "ref_logp", "kl": "kl"}
    truth = statistics(wide, y, temperature, vocab_mask=mask, ref_logits=ref)
    base = statistics(
        x.float(), y, temperature, vocab_mask=mask, ref_logits=None if ref is None else ref.float(), dtype=torch.float32
    )
    for theirs, ours in names.items():
        assert_within_policy(s[ours], truth[theirs], base[theirs], f"{case}, {ours}")
    assert torch.equal(s["is_top1"], truth["is_top1"])
    assert (s["logp"] <= 0).all() and (s["entropy"] >= 0).all()
    for k, name in enumerate(("logprobs", "entropy", "kl")[: 2 if ref is None else 3]):
        g = cotangents(y.shape, 3)[k]
        (expected,) = torch.autograd.grad(truth[name], wide, g.double(), retain_graph=True)
        upstream = [None] * 3
        upstream[k] = g
        got = backward(x, y, s, *upstream, temperature, mask, ref)
        assert_gradient(
            got,
            expected,
            gradient_allowance({name: g}, x, y, temperature, vocab_mask=mask, ref_logits=ref),
            f"{case}, gradient of {name}",
        )


# One interpreter per instruction set: importing torch is half of what a child costs.
CHILD = """
    import sys

    import pytest
    from rlkernels.backends import cpu

    print(cpu.isa(), flush=True)
    sys.exit(pytest.main(sys.argv[1:]))
"""
BELOW = (
    "error_policy and (1- or 7- or 1025- or 4097-) or 16_bits or streamed or block_of "  # this file
    "or test_extremes or every_width and (jsd or forward)"  # test_cpu_divergence.py
)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_each_lower_instruction_set_keeps_the_error_policy_and_gives_the_definition_of_divergences(isa):
    order = ["baseline", "avx2", "avx512", "amx"]
    if order.index(isa) >= order.index(cpu.isa()):
        pytest.skip(f"this machine's best is {cpu.isa()}")
    files = __file__, Path(__file__).with_name("test_cpu_divergence.py")
    done = subprocesses.code(
        CHILD, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files, "-k", BELOW, RLKERNELS_CPU_ISA=isa
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.split()[0] == isa


def test_an_instruction_set_that_is_not_there_is_refused():
    done = subprocesses.code("from rlkernels.backends import cpu", RLKERNELS_CPU_ISA="avx1024")
    assert (
        done.returncode != 0
        and "RLKERNELS_CPU_ISA must be amx, avx512, avx2 or baseline" in done.stderr
        and "got 'avx1024'" in done.stderr
    )


def test_float64_is_computed_in_float64():
    x, y, mask = draw_rows((6,), 301, torch.float64)
    ref = draw_rows((6,), 301, torch.float64, seed=1)[0]
    s, wide = stats(x, y, 0.7, mask, ref), x.clone().requires_grad_()
    truth = statistics(wide, y, 0.7, vocab_mask=mask, ref_logits=ref)
    for ours, theirs in {"logp": "logprobs", "entropy": "entropy", "kl": "kl", "mean_logits": "mean_logits"}.items():
        torch.testing.assert_close(s[ours], truth[theirs].detach(), rtol=1e-12, atol=1e-12)
    g = cotangents(y.shape, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad((truth["logprobs"], truth["entropy"], truth["kl"]), wide, g)
    torch.testing.assert_close(backward(x, y, s, *g, 0.7, mask, ref), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("vocab", (1, 7, 1025, 4097, 9001))
def test_16_bits_give_the_bits_of_the_same_values_in_float32(vocab, dtype):
    x, y, mask = draw_rows((7,), vocab, dtype)
    x[0, 0] = -0.0
    x[1, vocab // 2] = -INF
    x[3, vocab // 2] = NAN
    ref = draw_rows((7,), vocab, dtype, seed=5)[0]
    for options in ({}, {"mask": mask}, {"temperature": 0.3}):
        narrow, wide = stats(x, y, **options), stats(x.float(), y, **options)
        assert_same(
            {k: v.nan_to_num(12345.0) for k, v in narrow.items()}, {k: v.nan_to_num(12345.0) for k, v in wide.items()}
        )
    narrow, wide = stats(x, y, ref=ref), stats(x.float(), y, ref=ref.float())
    assert_same(
        {k: v.nan_to_num(12345.0) for k, v in narrow.items()}, {k: v.nan_to_num(12345.0) for k, v in wide.items()}
    )


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_bits_depend_on_the_row_alone(dtype):
    rows, vocab = 41, 5003  # more rows than a run of rows has, a row longer than a block
    x, y, mask = draw_rows((rows,), vocab, dtype)
    whole = everything(x, y, mask=mask)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert_same(everything(x, y, mask=mask), whole)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    g = [g[order] for g in cotangents(y.shape, 2, dtype=whole["logp"].dtype)]
    s = stats(x[order], y[order], mask=mask[order])
    shuffled = {**s, "gradient": backward(x[order], y[order], s, *g, mask=mask[order])}
    assert_same(shuffled, {k: v[order] if v.numel() else v for k, v in whole.items()})
    for row in (0, 7):
        one = stats(x[row : row + 1], y[row : row + 1], mask=mask[row : row + 1])
        assert_same(one, {k: whole[k][row : row + 1] if whole[k].numel() else whole[k] for k in one})
    for shift in (1, 3, 5):  # addresses and strides that no vector divides
        parent = torch.full((rows, vocab + 2 * shift), NAN, dtype=dtype)
        view = parent[:, shift : shift + vocab]
        view.copy_(x)
        assert_same(everything(view, y, mask=mask), whole)


def test_in_place_gives_the_bits_of_out_of_place():
    for dtype in (*DTYPES, torch.float64):
        for vocab in (1, 37, 4100):
            x, y, mask = draw_rows((6,), vocab, dtype)
            ref = draw_rows((6,), vocab, dtype, seed=3)[0]
            for options in ({}, {"mask": mask}, {"ref": ref}):
                expected, place = everything(x, y, **options)["gradient"], x.clone()
                s = stats(place, y, **options)
                got = backward(
                    place,
                    y,
                    s,
                    *cotangents(y.shape, 3 if "ref" in options else 2, dtype=s["logp"].dtype),
                    **options,
                    out=place,
                )
                assert got is place and same_bits(place, expected), (dtype, vocab, tuple(options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_streamed_gradient_has_the_bits_of_a_small_one(dtype):
    rows, vocab = 72, 128257  # over 16 MiB is stored around the cache; an odd row starts at every alignment
    x, y, _ = draw_rows((rows,), vocab, dtype)
    s, g = stats(x, y), cotangents(y.shape, 2)
    large = backward(x, y, s, *g)
    for row in (0, 1, 2, 5, 31, rows - 1):
        at = slice(row, row + 1)
        small = backward(x[at], y[at], {k: v[at] for k, v in s.items()}, *(d[at] for d in g))
        assert same_bits(large[at], small), row


@pytest.mark.fault(17)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_block_of_minus_infinity_counts_as_absent(dtype):
    x, y, _ = draw_rows((4,), 9000, dtype)
    x[0, :4096] = x[0, 8192:] = -INF  # the first block and the last
    x[1, :8999], y[1] = -INF, 8999
    x[3] = -INF
    x[3, 5000] = NAN
    s = stats(x, y, wanted=ENTROPY)
    truth = statistics(x.double(), y)
    base = statistics(x.float(), y, dtype=torch.float32)
    for name, theirs in (("logp", "logprobs"), ("entropy", "entropy")):
        assert_within_policy(s[name], truth[theirs], base[theirs], name)
    assert s["logp"][1] == 0 and s["entropy"][1] == 0 and s["logp"][3].isnan()
    gradient = backward(x, y, s, torch.ones(4), torch.ones(4))
    assert (gradient[0][x[0] == -INF] == 0).all() and gradient[:3].isfinite().all() and gradient[3].isnan().any()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_what_a_dead_row_holds_reaches_nothing(dtype):
    x, y, _ = draw_rows((9,), 501, dtype)
    y[4], real = -100, torch.float64 if dtype == torch.float64 else torch.float32
    clean = everything(x, y)
    x[4] = NAN
    dirty = everything(x, y)
    assert_same(dirty, clean)
    assert (
        all(v[4].abs().sum() == 0 for k, v in dirty.items() if v.numel() and v.dtype != torch.bool)
        and not dirty["is_top1"][4]
    )
    zero = torch.zeros(9, dtype=real)
    x[5] = NAN  # live, but no gradient arrives: not read, and written as zeros
    assert (backward(x, y, stats(x, y), zero, zero) == 0).all()


GUARDED = """
    import ctypes, mmap, torch
    from flat_backend import Flat
    from rlkernels.backends import cpu

    def guarded(t):  # the last byte stands before a page that cannot be read
        n, page = t.numel() * t.element_size(), mmap.PAGESIZE
        pages = -(-n // page)
        m = mmap.mmap(-1, (pages + 1) * page)
        base = ctypes.addressof((ctypes.c_char * len(m)).from_buffer(m))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages * page), page, 0) == 0
        return torch.frombuffer(m, dtype=t.dtype, count=t.numel(), offset=pages * page - n).view(t.shape).copy_(t)

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        for vocab in (1, 3, 31, 64, 65, 1023, 4095, 4097):
            x, ref = (guarded(torch.randn(2, vocab).to(dtype)) for _ in range(2))
            y, mask = guarded(torch.tensor([0, vocab - 1])), guarded(torch.ones(2, vocab, dtype=torch.bool))
            g, out = guarded(torch.ones(2, dtype=real)), guarded(torch.zeros(2, vocab, dtype=dtype))
            for m, r in ((None, None), (mask, None), (None, ref)):
                s = Flat(cpu).token_stats(x, y, g, -100, m, r, 15 if r is None else 31)
                of_reference = s[8:11] if r is not None else [None] * 3
                dkl = None if r is None else g
                Flat(cpu).token_stats_backward(g, g, dkl, x, y, g, -100, m, r, *s[1:4], *of_reference, out)
            Flat(cpu).fused_policy("ppo_clip", x, y, g, -100, mask, [g, g], [0.2, 0.2], g, g, "k3", g, g, True, out)
    for n in (1, 5, 4097):
        a, b = guarded(torch.randn(n)), guarded(torch.ones(n, dtype=torch.bool))
        cpu.elementwise("k3", [a, a], [], a)
        cpu.gae(a.view(1, n), a.view(1, n), b.view(1, n), None, 0.9, 0.9, "skip")
    print("no byte beyond")
"""


@pytest.mark.fault(2)
def test_no_kernel_touches_a_byte_behind_its_tensors():
    done = subprocesses.code(GUARDED)
    assert done.stdout.strip() == "no byte beyond", done.stderr
