"""The bf16 matmul with the tile instructions of AMX: its unmodified source over an emulation of them, against float64,
and against the processor's own instructions where it has them.
"""

import ctypes

import pytest
import subprocesses
import torch
from reference import same_bits
from source_trees import CXX, ROOT, needs_compiler, needs_sources, run

from rlkernels.backends import cpu, cpu_matmul
from rlkernels.cli import doctor

HERE = ROOT / "tests/backends/cpu_backend"
FLAGS = "-std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wno-psabi -fopenmp"
VECTORS = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
pytestmark = [
    needs_sources,
    needs_compiler,
    pytest.mark.skipif(not cpu_matmul.fp32_available(), reason="the emulation is compiled for AVX-512"),
]
tiles_here = pytest.mark.skipif(cpu_matmul.name() != "amx", reason="this machine or this build has no AMX")
NAN, INF = float("nan"), float("inf")
# Around a pair, the 16 lanes of a register, the 32 of a tile, and a slice of 512.
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 48, 65, 130, 511, 513)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """``emulated(a, b, out=None, accumulate=False, threads=1)``: ``mm`` of the emulated tiles."""
    path = tmp_path_factory.mktemp("tiles") / "emulated.so"
    sources = ROOT / "csrc/cpu/gemm.cpp", ROOT / "csrc/cpu/gemm_amx.cpp", HERE / "emulated_tiles.cpp"
    header = "-include", HERE / "amx_emulation.h"
    run([CXX, *FLAGS.split(), *VECTORS.split(), *header, f"-I{ROOT / 'csrc'}", *sources, "-o", path])
    product = ctypes.CDLL(str(path)).emulated_product

    def mm(a, b, out=None, accumulate=False, threads=1):
        (m, k), n = a.shape, b.shape[1]
        out = torch.full((m, n), NAN) if out is None else out
        operands = [v for x in (a, b) for v in (x.data_ptr(), *x.stride(), x.dtype == torch.float32)]
        numbers = m, n, k, accumulate, threads, *operands, out.data_ptr(), out.stride(0)
        product((ctypes.c_int64 * len(numbers))(*numbers))
        return out

    return mm


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid(x, layout):
    """The same numbers by rows, by columns, or with every other element left out; what lies between them is NaN."""
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "rows":
        return x.contiguous()
    return x.new_full((x.shape[0], 2 * x.shape[1]), NAN)[:, ::2].copy_(x)


def assert_close(got, a, b, start=0.0):
    """Against float64. A sum takes at most 16 products, the other 16, 16 tiles and one per slice, each off by half a
    unit of the magnitudes' sum.
    """
    a, b = a.bfloat16().double(), b.double()
    error = (got.double() - (a @ b + start)).abs()
    bound = (36 + a.shape[1] / 512) * 2.0**-24 * (a.abs() @ b.abs() + abs(start))
    assert (error <= bound).all(), f"{tuple(a.shape)} by {tuple(b.shape)}: off by {error.max():.2e}"


@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
@pytest.mark.parametrize("of_a", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_emulated_tiles_agree_with_float64_in_every_size_and_layout(emulated, of_a, layout):
    others = ("rows", "columns", "every other")
    for i, k in enumerate(SIZES):
        for j in range(4):
            m, n = SIZES[(i + 3 * j) % len(SIZES)], SIZES[(5 * i + 4 * j) % len(SIZES)]
            a, b = laid(normal(m, k, seed=i).to(of_a), layout), normal(k, n, seed=j).bfloat16()
            parent = torch.full((m, n + 5), NAN)
            out = emulated(a, laid(b, others[(i + j) % 3]), parent[:, :n])
            assert_close(out, a, b)
            assert parent[:, n:].isnan().all(), "what lies between the rows was written"
            parent[:, :n] = 2.0
            assert_close(emulated(a, b, parent[:, :n], accumulate=True), a, b, 2.0)


def test_the_bits_of_a_row_of_tiles_depend_on_nothing_beside_it(emulated):
    a, b = normal(70, 1100), normal(1100, 150, seed=1).bfloat16()
    whole = emulated(a, b)
    assert same_bits(emulated(a, b, threads=2), whole) and same_bits(emulated(a.bfloat16(), b), whole)
    for layout in ("columns", "every other"):
        assert same_bits(emulated(laid(a, layout), laid(b, layout)), whole), layout
    for rows in (slice(0, 1), slice(15, 18), slice(69, 70)):
        assert same_bits(emulated(a[rows], b), whole[rows]), rows
    for columns in (slice(0, 1), slice(31, 34), slice(127, 150)):
        assert same_bits(emulated(a, b[:, columns]), whole[:, columns]), columns
    parts = [emulated(a[:, k : k + 512], b[k : k + 512]) for k in (0, 512, 1024)]
    assert same_bits(whole, parts[0] + parts[1] + parts[2])


def test_a_streamed_product_of_tiles_has_the_bits_of_a_small_one(emulated):
    a, b = normal(129, 5).bfloat16(), normal(5, 32800, seed=1).bfloat16()
    memory = torch.empty(129 * 32800 + 16)
    start = -memory.data_ptr() // 4 % 16  # aligned to 64 bytes, without which nothing is streamed
    large = emulated(a, b, memory[start : start + 129 * 32800].view(129, 32800))
    assert same_bits(large[[3, 128]], emulated(a[[3, 128]], b)) and same_bits(large[:, -20:], emulated(a, b[:, -20:]))


def products(emulated):
    """The emulation, and the processor's own instructions where it has them."""
    own = [lambda a, b: cpu_matmul.mm(a, b, torch.full((a.shape[0], b.shape[1]), NAN))]
    return [emulated] + own * (cpu_matmul.name() == "amx")


def of_row(values, product):
    """The sum of these numbers, each in fp32, as elements of K."""
    return product(torch.tensor([values]), torch.ones(len(values), 1).bfloat16()).item()


def test_even_and_odd_products_are_two_chains_whose_sums_are_rounded_to_nearest_even(emulated):
    tiny = 2.0**-24
    for product in products(emulated):
        # 1 + tiny is 1, as an even tie. The odd chain keeps its two, and adds them to 1.
        assert of_row([1.0, tiny, tiny, tiny], product) == 1.0 + 2 * tiny
        assert of_row([1.0, 0.0, tiny, 0.0, tiny, 0.0], product) == 1.0
        assert of_row([0.0, 1.0, 0.0, tiny, 0.0, tiny], product) == 1.0
        # A chain ends after 16 pairs: the next begins at zero, and comes to the sum of those before.
        assert of_row([1.0] + [0.0] * 31 + [tiny, 0.0, tiny, 0.0], product) == 1.0 + 2 * tiny
        # The other way round is the same.
        assert of_row([1.0 + 2.0**-7] + [0.0] * 31 + [tiny], product) == 1.0 + 2.0**-7


def test_subnormal_operands_products_and_sums_of_tiles_are_zero(emulated):
    smallest = 2.0**-126
    for product in products(emulated):
        assert of_row([smallest], product) == smallest
        assert of_row([smallest / 2], product) == 0.0
        assert of_row([smallest * (1 - 2.0**-12)], product) == 0.0  # rounding would have made it normal
        assert of_row([1.5 * smallest, 0.0, -smallest], product) == 0.0
        assert of_row([1.5 * smallest, -smallest], product) == 0.0
        a, b = torch.tensor([[2.0**-70, 2.0**-70]]), torch.tensor([[2.0**-60], [2.0**-60]]).bfloat16()
        assert product(a, b).item() == 0.0
        assert torch.isnan(product(torch.tensor([[INF, 1.0]]), torch.tensor([[0.0], [1.0]]).bfloat16())).all()


def test_nan_and_infinity_of_tiles_reach_their_row_or_column_and_no_other(emulated):
    a, b = normal(40, 37), normal(37, 50, seed=1).bfloat16()
    clean = emulated(a, b)
    a[13, 36], b[36, 44] = NAN, INF
    dirty = emulated(a, b)
    kept = torch.ones(40, 50, dtype=torch.bool)
    kept[13], kept[:, 44] = False, False
    assert same_bits(dirty[kept], clean[kept]) and dirty[13].isnan().all()
    assert not dirty[:, 44].isfinite().any()


@tiles_here
def test_the_emulation_has_the_bits_of_the_instructions(emulated):
    for seed, scale in enumerate((1.0, 1e-19, 1e19)):
        a, b = normal(37, 700, seed=seed) * scale, (normal(700, 70, seed=9) * scale).bfloat16()
        assert same_bits(cpu_matmul.mm(a, b, torch.empty(37, 70)), emulated(a, b)), scale
    # Any bits at all: NaN, infinity and subnormal numbers among them.
    draw = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-(2**15), 2**15, s, generator=draw).short().view(torch.bfloat16) for s in ((64, 9), (9, 64)))
    ours, theirs = cpu_matmul.mm(a, b, torch.empty(64, 64)), emulated(a, b)
    assert torch.equal(ours.isnan(), theirs.isnan()) and 0.1 < ours.isnan().float().mean() < 0.9
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


SAYS = """
    import ctypes, sys, torch
    if "small" in sys.argv:
        class Stack(ctypes.Structure):
            _fields_ = ("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)
        memory = ctypes.create_string_buffer(8192)
        stack = Stack(ctypes.addressof(memory), 0, 8192)
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
    from rlkernels.backends import cpu, cpu_matmul
    a, b = torch.ones(3, 40), torch.ones(40, 5).bfloat16()
    assert (cpu_matmul.mm(a, b, torch.empty(3, 5)) == 40).all()
    print(cpu.isa(), cpu_matmul.name())
"""


@tiles_here
def test_where_the_kernel_refuses_the_registers_the_vectors_serve_without_a_word():
    # 8 KiB of a signal stack cannot hold them, so that Linux says no to the whole process.
    refused = subprocesses.code(SAYS, "small")
    assert (refused.stdout.split(), refused.stderr) == (["avx512", "avx512_bf16"], "")
    asked = subprocesses.code(SAYS, "small", RLKERNELS_CPU_ISA="amx")
    assert asked.returncode != 0
    assert "RLKERNELS_CPU_ISA must be amx, avx512, avx2 or baseline, and no more than" in asked.stderr
    assert "(avx512); got 'amx'" in asked.stderr


@tiles_here
@pytest.mark.parametrize(
    ("wish", "served"), [("", ["amx", "amx"]), ("amx", ["amx", "amx"]), ("avx512", ["avx512", "avx512_bf16"])]
)
def test_the_variable_chooses_between_tiles_and_vectors(wish, served):
    assert subprocesses.code(SAYS, RLKERNELS_CPU_ISA=wish).stdout.split() == served


def test_doctor_names_the_product_that_serves():
    said = doctor.facts_of_the_machine()["bf16 matmul of the cpu backend"]
    assert said == {"amx": "AMX", "avx512_bf16": "AVX512_BF16", None: "torch's in fp32"}[cpu_matmul.name()]
    assert doctor.facts_of_the_machine()["instruction set of the cpu backend"] == cpu.isa()
