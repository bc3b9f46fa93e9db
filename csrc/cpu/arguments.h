// The arguments of the CPU kernels that CUDA has otherwise, and the functions over the rows of one call.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "../arguments.h"
#include "mode.h"
#include "rows.h"

namespace rlk {

// The rows of one call.
struct Batch {
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, columns = 0;
  Layout logits, ref;  // ref.address 0: no reference
  std::vector<int64_t> targets;
  int64_t ignore_index = -100;
  double temperature = 1;
  std::vector<double> temperatures;  // one per row; empty: the number above
  uintptr_t mask = 0;                // one byte per column; 0: every column is in the support
  int64_t mask_stride = 0;
  int threads = 1;

  int64_t bytes() const { return item_size(dtype); }
  const void* row(int64_t r) const { return logits.row(r, bytes()); }
  const void* ref_row(int64_t r) const { return ref.address ? ref.row(r, bytes()) : nullptr; }
  int64_t target(int64_t r) const { return targets[size_t(r)]; }
  const uint8_t* mask_row(int64_t r) const {
    return mask ? reinterpret_cast<const uint8_t*>(mask) + r * mask_stride : nullptr;
  }
  double temperature_of(int64_t r) const { return temperatures.empty() ? temperature : temperatures[size_t(r)]; }
  double value(const void* row, int64_t c) const {
    switch (dtype) {
      case Dtype::f64: return static_cast<const double*>(row)[c];
      case Dtype::bf16: return widen(static_cast<const Bf16*>(row)[c]);
      case Dtype::f16: return widen(static_cast<const F16*>(row)[c]);
      default: return static_cast<const float*>(row)[c];
    }
  }
  void set(void* row, int64_t c, double x) const {
    switch (dtype) {
      case Dtype::f64: static_cast<double*>(row)[c] = x; break;
      case Dtype::bf16: narrow(float(x), static_cast<Bf16*>(row) + c); break;
      case Dtype::f16: narrow(float(x), static_cast<F16*>(row) + c); break;
      default: static_cast<float*>(row)[c] = float(x);
    }
  }
  bool supports(int64_t r, int64_t c) const { return !mask || mask_row(r)[c]; }

  // Copies the targets, because a target becomes an address and another thread may change the caller's after the check.
  void read_targets(uintptr_t from, int64_t stride, int64_t bytes) {
    targets.resize(size_t(rows));
    const char* at = reinterpret_cast<const char*>(from);
    for (int64_t r = 0; r < rows; ++r, at += stride * bytes)
      targets[size_t(r)] = bytes == 8 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
  }
  void read_temperatures(uintptr_t from) {
    temperatures.resize(from ? size_t(rows) : 0);
    for (size_t r = 0; r < temperatures.size(); ++r)
      temperatures[r] = dtype == Dtype::f64 ? reinterpret_cast<const double*>(from)[r]
                                            : double(reinterpret_cast<const float*>(from)[r]);
  }
  // The first row whose target is neither a column nor ignored, or -1.
  int64_t bad_target() const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = target(r);
      if (y != ignore_index && (y < 0 || y >= columns)) return r;
    }
    return -1;
  }
  // The first row whose temperature is outside of [2**-40, 2**40], or -1.
  int64_t bad_temperature() const {
    for (size_t r = 0; r < temperatures.size(); ++r)
      if (const double t = temperatures[r]; !(t >= 0x1p-40 && t <= 0x1p40)) return int64_t(r);
    return -1;
  }
};

// Calls f for every row. Rows are handed out in small runs, because dead rows cost nothing and equal shares would not
// be equal work. A run keeps neighbours in memory on one thread. No bit of a row depends on the thread that takes it.
// A small batch stays on the calling thread, because waking another costs more than 64K columns.
template <class F>
void for_rows(int64_t rows, int64_t columns, int threads, F f) {
  const int64_t run = rows / (int64_t(threads) * 32) + 1;
  const auto mode = float_mode();
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1 && rows * columns > 65536)
  {
    const FloatMode as_the_caller(mode);
#pragma omp for schedule(dynamic, run)
    for (int64_t r = 0; r < rows; ++r) f(r);
  }
}

RowSums sums_of_row(const Batch&, const RowKernels&, const void* row, const void* ref, double ref_row_max, int64_t r,
                    unsigned wanted);
double logp_of(const Batch&, const void* row, const RowSums&, int64_t r);
double entropy_of(const RowSums&, double temperature);

template <class Real>
void write_gradient(const Batch&, const RowKernels&, int64_t r, void* out, const SavedRow<Real>&,
                    const Upstream<double>&, bool stream);

// A larger output is stored around the cache, because no cache would hold it until someone reads it and a plain store
// reads its line first (262 MB copied on a two-core Zen 4: 11.6 ms against 17.4 ms).
constexpr int64_t kStreamBytes = int64_t(16) << 20;
inline bool streams(const Batch& batch, const Layout& out) {
  return out.address != batch.logits.address && batch.rows * batch.columns * batch.bytes() >= kStreamBytes;
}

template <class Real>
void token_stats(const Batch&, const StatsOutputs&);

template <class Real>
void token_stats_backward(const Batch&, const BackwardInputs&, const Layout& out);

// The kinds of a divergence, in the order of types.DivergenceKind.
enum class Divergence : int { forward_kl, reverse_kl, jsd, cross_entropy };

// The divergence of each row from that of the reference, the teacher, and the gradient of the sum of the divergences
// times their weights. Writes no gradient where out.address is 0.
template <class Real>
void divergence(const Batch&, Divergence, double beta, uintptr_t weights, uintptr_t values, const Layout& out);

// The objective and the estimator of its penalty, by name. `columns`: addresses, without that of the log-probability.
struct PolicyArguments {
  const char* objective;
  const char* kl;  // null: no penalty
  const uintptr_t* columns;
  const double* params;
  PolicyInputs per_row;
};
// Returns the loss, which is infinite where Real does not reach. Writes no gradient where out.address is 0.
template <class Real>
Real fused_policy(const Batch&, const PolicyArguments&, const PolicyOutputs&, const Layout& out);

// The arguments of a weighted loss beside those of `elementwise`. The derivative is then that of the loss.
struct OfLoss {
  uintptr_t minus[2];    // columns that are taken from the first; 0: none
  const uint8_t* mask;   // a weight of 1 or 0 instead of `weight`; null: none
  const int64_t* total;  // a count that divides every weight; null: none
  double share;          // a factor of every weight
  uintptr_t opposite;    // where the negative of the derivative goes; 0: nowhere
};

// Evaluates an objective over n elements. An input or output that is absent is null. Returns the weighted sum of the
// values, which is infinite where Real does not reach.
template <class Real>
Real elementwise(const char* objective, const uintptr_t* columns, const double* params, const Real* weight, Real* value,
                 Real* derivative, int64_t n, int threads, const OfLoss* of_loss = nullptr);

template <class Real>
void gae(const GaeJob<Real>&, int threads);

}  // namespace rlk
