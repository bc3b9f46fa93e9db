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

constexpr int64_t kMaxColumns = 960;  // of a task
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

// The cut of out into tasks of at most max_rows x kMaxColumns: the size of a task, and their number down and across.
struct Cut {
  int64_t rows, columns, down, across;
};

// The quickest of the cuts near the coarsest.
Cut cut(const GemmJob& job, const TileShape& shape, int threads) {
  Cut best{};
  double least = 0;
  const int64_t down = blocks(job.m, shape.max_rows), across = blocks(job.n, kMaxColumns);
  for (int64_t d = down; d < down + threads; ++d)
    for (int64_t c = across; c < across + threads; ++c) {
      Cut x{whole(blocks(job.m, d), shape.rows), whole(blocks(job.n, c), shape.columns), 0, 0};
      x.down = blocks(job.m, x.rows), x.across = blocks(job.n, x.columns);
      const double time = (double(x.rows * x.columns) + shape.packing_columns * double(x.rows + x.columns)) *
                          double(blocks(x.down * x.across, threads));
      if (least == 0 || time < least) best = x, least = time;
    }
  return best;
}

// The sizes of one thread's packed operands, and of their parts, in words.
struct Scratch {
  int64_t a_panel, b_group, a, b;
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
  const TileShape& shape = kernels.shape;
  const int64_t slice = kSlice * kernels.elements;
  const int64_t group = kLanes / shape.panel * size.a_panel;
  for (int64_t k = 0; k < job.k; k += slice) {
    const int64_t depth = smaller(slice, job.k - k);
    kernels.pack_a({start(job.a, i, k), job.a.row, job.a.column, rows, depth, job.a.wide},
                   {a, group, size.a_panel, shape.panel});
    for (int64_t c = 0; c < columns; c += shape.packed_columns) {
      const int64_t width = smaller(shape.packed_columns, columns - c);
      kernels.pack_b({start(job.b, k, j + c), job.b.column, job.b.row, width, depth, job.b.wide},
                     {b, size.b_group, kLanes / 2, shape.step});
      for (int64_t v = 0; v < width; v += shape.columns)
        for (int64_t r = 0; r < rows; r += shape.rows)
          kernels.tile({a + r / shape.panel * size.a_panel, b + v / kLanes * size.b_group, size.a_panel, size.b_group,
                        depth, job.out + (i + r) * job.out_row + j + c + v, job.out_row,
                        int(smaller(shape.rows, rows - r)), int(smaller(shape.columns, width - v)),
                        job.accumulate || k > 0, stream});
    }
  }
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
  const TileShape& shape = kernels.shape;
  const Cut plan = cut(job, shape, wanted);
  const int64_t tasks = plan.down * plan.across;
  const int64_t words = whole(smaller(blocks(job.k, kernels.elements), kSlice), shape.words);
  const int threads = int(smaller(wanted, tasks));
  Scratch size{words * shape.panel + kApart, shape.step == kLanes ? words * kLanes : kLanes, 0,
               words * smaller(shape.packed_columns, whole(job.n, shape.columns))};
  size.a = whole(plan.rows, kLanes) / shape.panel * size.a_panel;
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
    kernels.begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; ++t) task(job, kernels, plan, size, t, stream, scratch.data + thread() * each);
    kernels.end();
  }
}

}  // namespace rlk
