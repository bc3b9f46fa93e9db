// The blocks of a matmul. Each task owns a rectangle of out, packs its part of a and b by slices, and shares no sum.
#include "gemm.h"
#include "mode.h"

#include <cstring>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace rlk {
namespace {

// The packed rows of a task fill half a level-2 cache of 1 MiB, beside 48 KiB of packed columns (Zen 4: 256 rows cost 3
// to 6 %, and 1024 gain nothing).
constexpr int64_t kMaxRows = 512, kMaxColumns = 20 * kTileColumns;
// Words between panels of a. At 8 KiB from one to the next, all panels would share a few sets of the cache.
constexpr int64_t kApart = 16;
// Multiplications. A smaller matmul stays on the calling thread, because waking another costs more.
constexpr int64_t kAlone = 1 << 21;
// Bytes of out. A larger one is stored around the cache, because no cache holds it until someone reads it (one core:
// from 203 to 206 GFLOP/s).
constexpr int64_t kStream = 16 << 20;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }
int64_t whole(int64_t size, int64_t block) { return blocks(size, block) * block; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The cut of out into tasks of at most kMaxRows x kMaxColumns: the size of a task, and their number down and across.
struct Cut {
  int64_t rows, columns, down, across;
};

// The quickest of the cuts near the coarsest, if the multiplications of a word cost 1/16 cycle and packing a bf16
// element half a cycle.
Cut cut(const GemmJob& job, int threads) {
  Cut best{};
  double least = 0;
  const int64_t down = blocks(job.m, kMaxRows), across = blocks(job.n, kMaxColumns);
  for (int64_t d = down; d < down + threads; ++d)
    for (int64_t c = across; c < across + threads; ++c) {
      Cut x{whole(blocks(job.m, d), kTileRows), whole(blocks(job.n, c), kTileColumns), 0, 0};
      x.down = blocks(job.m, x.rows), x.across = blocks(job.n, x.columns);
      const double time =
          double(x.rows * x.columns + 16 * (x.rows + x.columns)) * double(blocks(x.down * x.across, threads));
      if (least == 0 || time < least) best = x, least = time;
    }
  return best;
}

// The sizes of one thread's packed operands, in words.
struct Scratch {
  int64_t a_panel, a, b;
};

void task(const GemmJob& job, const GemmKernels& kernels, const Cut& cut, const Scratch& size, int64_t at, bool stream,
          uint32_t* scratch) {
  // Neighbouring tasks share their part of the longer operand, because the shorter one stays in the cache.
  const bool rows_first = job.m < job.n;
  const int64_t i = (rows_first ? at % cut.down : at / cut.across) * cut.rows;
  const int64_t j = (rows_first ? at / cut.down : at % cut.across) * cut.columns;
  const int64_t rows = smaller(cut.rows, job.m - i), columns = smaller(cut.columns, job.n - j);
  uint32_t *const a = scratch, *const b = scratch + size.a;
  const auto start = [](const Operand& x, int64_t row, int64_t column) {
    return x.address + uintptr_t((row * x.row + column * x.column) * (x.wide ? 4 : 2));
  };
  const int64_t slice = kSlice * kernels.elements;
  for (int64_t k = 0; k < job.k; k += slice) {
    const int64_t depth = smaller(slice, job.k - k);
    kernels.pack({start(job.a, i, k), job.a.row, job.a.column, rows, depth, job.a.wide},
                 {a, 2 * size.a_panel, size.a_panel, kTileRows});
    for (int64_t c = 0; c < columns; c += kTileColumns) {
      const int64_t width = smaller(kTileColumns, columns - c);
      kernels.pack({start(job.b, k, j + c), job.b.column, job.b.row, width, depth, job.b.wide},
                   {b, kLanes, kLanes / 2, kTileColumns});
      for (int64_t r = 0; r < rows; r += kTileRows)
        kernels.tile({a + r / kTileRows * size.a_panel, b, depth, job.out + (i + r) * job.out_row + j + c, job.out_row,
                      int(smaller(kTileRows, rows - r)), int(width), job.accumulate || k > 0, stream});
    }
  }
  if (stream) kernels.fence();
}

int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

bool gemm_available() { return gemm_kernels().tile != nullptr; }

bool gemm_f32_available() { return gemm_f32_kernels().tile != nullptr; }

void gemm(const GemmJob& job) {
  if (job.m == 0 || job.n == 0) return;
  if (job.k == 0) {
    for (int64_t i = 0; i < job.m && !job.accumulate; ++i)
      std::memset(job.out + i * job.out_row, 0, size_t(job.n) * sizeof(float));
    return;
  }
  const GemmKernels kernels = job.b.wide ? gemm_f32_kernels() : gemm_kernels();
  const int wanted = double(job.m) * double(job.n) * double(job.k) < double(kAlone) ? 1 : job.threads;
  const Cut plan = cut(job, wanted);
  const int64_t tasks = plan.down * plan.across, words = smaller(blocks(job.k, kernels.elements), kSlice);
  const int threads = int(smaller(wanted, tasks));
  Scratch size{words * kTileRows + kApart, 0, words * kTileColumns};
  size.a = whole(plan.rows, kLanes) / kTileRows * size.a_panel;
  const int64_t each = size.a + size.b;
  const bool aligned = (reinterpret_cast<uintptr_t>(job.out) | uintptr_t(job.out_row) * sizeof(float)) % 64 == 0;
  const bool stream = aligned && !job.accumulate && job.k <= kSlice * kernels.elements &&
                      job.m * job.n * int64_t(sizeof(float)) >= kStream;
  struct Words {
    uint32_t* data;
    ~Words() { ::operator delete(data, std::align_val_t(64)); }
  } const scratch{
      static_cast<uint32_t*>(::operator new(size_t(each * threads) * sizeof(uint32_t), std::align_val_t(64)))};
  const auto mode = float_mode();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FloatMode as_the_caller(mode);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; ++t) task(job, kernels, plan, size, t, stream, scratch.data + thread() * each);
  }
}

}  // namespace rlk
