"""The matrix products of the CPU backend in bf16 and in fp32, judged against float64, and its bits against itself in
other batches, layouts and threads.
"""

import os
import sys

import pytest
import subprocesses
import torch
from reference import same_bits

from rlkernels.backends import cpu, cpu_matmul

native = pytest.mark.skipif(not cpu_matmul.available(), reason="this machine or this build has no AVX512_BF16")
native_fp32 = pytest.mark.skipif(not cpu_matmul.fp32_available(), reason="this machine or this build has no AVX-512")
both_dtypes = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=native), pytest.param(torch.float32, marks=native_fp32)],
    ids=["bf16", "fp32"],
)
built = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

NAN, INF = float("nan"), float("inf")
# One; around the pair, the lanes of a vector, two vectors, the tile of 48 columns and a run of 128; more rows than 8,
# more depth than a slice.
SIZES = (1, 2, 3, 15, 16, 17, 33, 64, 65, 100, 511)
LAYOUTS = ("rows", "columns", "every other", "offset and padded")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid(x, layout):
    """The same numbers in another layout; what lies between them is NaN."""
    rows, columns = x.shape
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "every other":
        view = x.new_full((rows, 2 * columns), NAN)[:, ::2]
    elif layout == "offset and padded":
        view = x.new_full((1 + rows * (columns + 3),), NAN)[1:].view(rows, columns + 3)[:, :columns]
    else:
        return x.contiguous()
    return view.copy_(x)


def product(a, b):
    return cpu_matmul.mm(a, b, torch.full((a.shape[0], b.shape[1]), NAN))


def assert_close(got, a, b, start=0.0):
    """Against float64 on operands of b's dtype: a chain of 128 sums, then one per run, each off by half a unit of the
    magnitudes' sum.
    """
    a, b = a.to(b.dtype).double(), b.double()
    error, bound = (
        (got.double() - (a @ b + start)).abs(),
        (132 + a.shape[1] / 128) * 2.0**-24 * (a.abs() @ b.abs() + abs(start)),
    )
    assert (error <= bound).all(), (
        f"{tuple(a.shape)} by {tuple(b.shape)}: off by {error.max():.2e}, allowed there "
        f"{bound.flatten()[error.argmax()]:.2e}"
    )


@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [
        pytest.param(torch.bfloat16, torch.bfloat16, marks=native),
        pytest.param(torch.float32, torch.bfloat16, marks=native),
        pytest.param(torch.float32, torch.float32, marks=native_fp32),
    ],
    ids=["bf16", "fp32 by bf16", "fp32"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_size_and_layout_agrees_with_float64(layout, of_a, of_b):
    for i, k in enumerate(SIZES):
        for j, m in enumerate(SIZES):
            n = SIZES[(3 * i + 5 * j) % len(SIZES)]
            a, b = laid(normal(m, k, seed=i).to(of_a), layout), normal(k, n, seed=j).to(of_b)
            # The gap between rows is not touched, and without accumulate nothing of out is read.
            parent = torch.full((m, n + 5), NAN)
            out = cpu_matmul.mm(a, laid(b, LAYOUTS[(i + j) % 4]), parent[:, :n])
            assert_close(out, a, b)
            assert out.data_ptr() == parent.data_ptr() and parent[:, n:].isnan().all()
            parent[:, :n] = 2.0
            assert_close(cpu_matmul.mm(a, b, parent[:, :n], accumulate=True), a, b, 2.0)
            assert parent[:, n:].isnan().all()


@both_dtypes
@pytest.mark.parametrize("width", [512, 1024, 4096])
def test_logits_are_as_exact_as_a_product_in_fp32(width, dtype):
    hidden, weight = normal(64, width).to(dtype), (normal(3000, width, seed=1) * 10 / width**0.5).to(dtype)
    truth = hidden.double() @ weight.double().t()
    error = (product(hidden, weight.t()).double() - truth).pow(2).mean().sqrt()
    fp32 = ((hidden.float() @ weight.float().t()).double() - truth).pow(2).mean().sqrt()
    assert 9 < truth.std() < 11 and error <= 2e-6 and error <= 1.5 * fp32, (
        f"rms {error:.2e}, of torch in fp32 {fp32:.2e}"
    )


@both_dtypes
def test_the_bits_of_a_row_depend_on_nothing_beside_it(dtype):
    m, n, k = 601, 1111, 1300  # several tasks, three slices or more, tails everywhere
    a, b = normal(m, k), normal(k, n, seed=1).to(dtype)
    whole, threads = product(a, b), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same_bits(product(a, b), whole), f"{count} threads"
    finally:
        torch.set_num_threads(threads)
    for layout in LAYOUTS[1:]:
        assert same_bits(product(laid(a, layout), laid(b, layout)), whole), layout
    if dtype == torch.bfloat16:
        assert same_bits(product(a.bfloat16(), b), whole)
    for row in (0, 7, 8, 300, 600):
        assert same_bits(product(a[row : row + 1], b), whole[row : row + 1]), row
    assert same_bits(product(a[5:70], b), whole[5:70]) and same_bits(product(a.flip(0), b), whole.flip(0))
    for columns in (slice(0, 1), slice(47, 49), slice(100, 133), slice(1000, 1111)):
        assert same_bits(product(a, b[:, columns]), whole[:, columns]), columns


@both_dtypes
def test_a_streamed_product_has_the_bits_of_a_small_one(dtype):
    # Over 16 MiB is stored around the cache where rows are aligned.
    a, b = normal(130, 65).to(dtype), normal(65, 33000, seed=1).to(dtype)
    for n in (32768, 32777):
        large = product(a, b[:, :n])
        assert same_bits(large[[3, 129]], product(a[[3, 129]], b[:, :n])), n


@both_dtypes
def test_slices_of_1_KiB_are_added_to_out_one_after_the_other(dtype):
    a, b, start = normal(9, 1300).to(dtype), normal(1300, 50, seed=1).to(dtype), normal(9, 50, seed=2)
    depth = 1024 // dtype.itemsize
    parts = [product(a[:, k : k + depth], b[k : k + depth]) for k in range(0, 1300, depth)]
    assert same_bits(product(a, b), sum(parts[1:], parts[0]))
    assert same_bits(cpu_matmul.mm(a, b, start.clone(), accumulate=True), sum(parts, start))


@native_fp32
def test_fp32_keeps_subnormals_and_rounds_nothing():
    a, b = torch.tensor([[1e-20, 3e-38], [1.0 + 2.0**-23, 0.0]]), torch.tensor([[1e-20], [0.25]])
    assert torch.equal(product(a, b).double(), (a.double() @ b.double()).float().double())
    assert 0 < product(a, b)[0, 0] < 2.0**-126


@both_dtypes
def test_nan_and_infinity_reach_their_row_or_column_and_no_other(dtype):
    for depth in (33, 600):
        a, b = normal(50, depth), normal(depth, 60, seed=1).to(dtype)
        clean = product(a, b)
        a[13, depth - 1], a[20, 5], b[3, 44] = NAN, -INF, NAN
        b[depth - 1, 7] = INF
        dirty = product(a, b)
        kept = torch.ones(50, 60, dtype=torch.bool)
        kept[[13, 20]], kept[:, [44, 7]] = False, False
        assert same_bits(dirty[kept], clean[kept])
        assert dirty[13].isnan().all() and dirty[:, 44].isnan().all()
        others = [j for j in range(60) if j not in (44, 7)]
        assert torch.equal(dirty[20, others], -INF * b[5, others].float().sign())
        assert (dirty[kept.any(1), 7].abs() == INF).all()


@native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_fp32_operand_is_rounded_to_nearest_even(layout):
    patterns = [
        s << 31 | high << 16 | low
        for s in (0, 1)
        for high in (0x0080, 0x3F80, 0x3F81, 0x3FFF, 0x4000, 0x7F7E, 0x7F7F, 0x7F80, 0x0000)
        for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    ]
    # NaNs; subnormals that become 2^-126 and one that does not.
    patterns += [0x7FFFFFFF, 0x7F800001, 0x007F8000, 0x007F7FFF, 0x007FFFFF]
    x = torch.tensor([p - (1 << 32) if p >> 31 else p for p in patterns], dtype=torch.int32).view(torch.float32)
    expected = x.bfloat16().float()
    expected[expected.abs() < 2.0**-126] = 0.0  # the product counts subnormals as zero
    if cpu_matmul.name() == "amx":  # and so does the rounding
        expected[x.abs() < 2.0**-126] = 0.0
    for a in (x[:, None], torch.stack([x, torch.zeros_like(x)], 1), torch.stack([torch.zeros_like(x), x], 1)):
        got = product(laid(a, layout), torch.ones(a.shape[1], 1).bfloat16())[:, 0]
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(1.0), expected.nan_to_num(1.0))
    assert expected[-1] == (0.0 if cpu_matmul.name() == "amx" else 2.0**-126) and expected[-2] == 0


@both_dtypes
def test_empty_products_write_zeros_or_nothing(dtype):
    out = torch.full((3, 4), NAN)
    nothing = torch.empty(3, 0, dtype=dtype), torch.empty(0, 4, dtype=dtype)
    assert (cpu_matmul.mm(*nothing, out.fill_(5.0), accumulate=True) == 5).all()
    assert (cpu_matmul.mm(*nothing, out.fill_(NAN)) == 0).all()
    for m, n in ((0, 4), (4, 0)):
        assert product(torch.ones(m, 5), torch.ones(5, n).to(dtype)).shape == (m, n)


GUARDED = """
    import torch
    from rlkernels.backends import cpu_matmul
    from guard_pages import guarded

    DTYPES = [(torch.float32, torch.float32)]
    if cpu_matmul.available():
        DTYPES += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]

    def by_rows(x): return guarded(x)
    def by_columns(x): return guarded(x.t().contiguous()).t()
    def strided(x):
        apart = guarded(x.repeat_interleave(2, 1).flatten()[: 2 * x.numel() - 1])
        return apart.as_strided(x.shape, (2 * x.shape[1], 2))

    for m, n, k in ((1, 1, 1), (3, 47, 31), (9, 50, 33), (17, 16, 2), (65, 97, 515), (520, 64, 70)):
        for of_a, of_b in DTYPES:
            a, b = torch.randn(m, k).to(of_a), torch.randn(k, n).to(of_b)
            expected = cpu_matmul.mm(a, b, torch.empty(m, n))
            for place in (by_rows, by_columns, strided):
                for other in (by_rows, by_columns, strided):
                    out = guarded(torch.zeros(m, n))
                    assert torch.equal(cpu_matmul.mm(place(a), other(b), out), expected)
                    assert torch.equal(cpu_matmul.mm(place(a), other(b), out.zero_(), accumulate=True), expected)
    print("no byte beyond")
"""


@pytest.mark.fault(2)
@native_fp32
@pytest.mark.skipif(
    os.name != "posix" or sys.platform == "darwin", reason="mprotect of an anonymous mapping is used as on Linux"
)
def test_no_byte_behind_an_operand_or_the_result_is_touched():
    done = subprocesses.code(GUARDED)
    assert done.stdout.strip() == "no byte beyond", done.stderr


@built
def test_a_lower_instruction_set_has_no_product_and_says_so():
    done = subprocesses.code(
        """
        import torch
        from rlkernels.backends import cpu_matmul
        print(cpu_matmul.available(), cpu_matmul.fp32_available(), cpu_matmul.fp32_preferred())
        for dtype in (torch.bfloat16, torch.float32):
            try:
                cpu_matmul.mm(torch.ones(1, 1), torch.ones(1, 1, dtype=dtype), torch.ones(1, 1))
            except RuntimeError as error:
                print(error)
    """,
        RLKERNELS_CPU_ISA="baseline",
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert (
        said[0] == "False False False"
        and said[1].startswith("mm: AVX512_BF16 is absent here")
        and said[2].startswith("mm: AVX-512 is absent here")
    )


@native
def test_what_does_not_fit_is_refused_by_name():
    a, b, out = torch.ones(3, 4), torch.ones(4, 5).bfloat16(), torch.zeros(3, 5)
    for bad, error, message in [
        ((a.double(), b, out), TypeError, "a must be torch.bfloat16 or torch.float32 on the CPU, got torch.float64"),
        ((a, b.double(), out), TypeError, "b must be torch.bfloat16 or torch.float32 on the CPU, got torch.float64"),
        ((a.bfloat16(), b.float(), out), TypeError, "a must be torch.float32 on the CPU, got torch.bfloat16"),
        ((a, b, out.bfloat16()), TypeError, "out must be torch.float32 on the CPU, got torch.bfloat16"),
        ((a.to("meta"), b, out), TypeError, "a must be .* on the CPU, got torch.float32 on meta"),
        ((a[:, :3], b, out), ValueError, r"got \(3, 3\), \(4, 5\) and \(3, 5\)"),
        ((a, b, out[:2]), ValueError, r"got \(3, 4\), \(4, 5\) and \(2, 5\)"),
        ((a[0], b, out), ValueError, r"got \(4,\), \(4, 5\) and \(3, 5\)"),
        (
            (a, b, torch.zeros(5, 3).t()),
            ValueError,
            r"out must have its columns side by side and its rows apart, got "
            r"shape \(3, 5\) with strides \(1, 3\)",
        ),
        (
            (a, b, torch.zeros(1, 5).expand(3, 5)),
            ValueError,
            r"its rows apart, got shape \(3, 5\) with strides \(0, "
            r"1\)",
        ),
    ]:
        with pytest.raises(error, match=message):
            cpu_matmul.mm(*bad)
    assert (out == 0).all()
