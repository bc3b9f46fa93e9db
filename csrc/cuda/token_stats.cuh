// The statistics of a row, by one block. Each tensor of logits is read once.
#pragma once
#include "row_threads.cuh"

namespace rlk {

template <class T, unsigned kSums, class Row>
__device__ __forceinline__ void add_packed(Sums& s, const Packed<T>& x, const Packed<T>& r, long long column,
                                           const Row& row) {
  float a[kGroup], b[kGroup];
  unpack(x, a);
  if (kSums & kSumsReference) unpack(r, b);
  unsigned kept = 0xffu;
  if (row.mask || (kSums & kSumsExtra)) {
    kept = kept_columns(row.mask, column, row.columns);
    drop_columns(a, kept);
    if (kSums & kSumsReference) drop_columns(b, kept);
  }
  add_group<kSums>(s, a, b, kept, column, row.scale);
}

// The row that a sweep reads.
template <class T>
struct Row {
  const T *logits, *ref;
  const unsigned char* mask;
  long long columns;
  float scale;  // log2(e) / T
  bool wide;    // 16-byte loads are possible
};

template <class T>
__device__ __forceinline__ Row<T> row_of(const Rows& rows, long long r, float inverse_temperature) {
  Row<T> row{rows.logits.row<const T>(r), nullptr, rows.mask_row(r), rows.columns, kLog2E * inverse_temperature, false};
  row.wide = aligned(row.logits);
  if (rows.ref.address) {
    row.ref = rows.ref.row<const T>(r);
    row.wide = row.wide && aligned(row.ref);
  }
  return row;
}

template <class T, unsigned kSums, bool kOnce, class Crew>
__device__ __forceinline__ void sweep(Sums (&s)[Crew::kPerThread], const Row<T>& row) {
  // Steps whose loads are issued before the arithmetic of the first one begins, so that a thread has 64 bytes in
  // flight. No bit depends on that number.
  constexpr int kAhead = kSums & kSumsReference || sizeof(T) == 4 || Crew::kPerThread >= 4 ? 1 : 2,
                kLoads = Crew::kPerThread * kAhead;
  constexpr long long kTogether = kAhead * kStripe;
  long long column = Crew::first(), start = 0;
  for (; row.wide && start + kTogether <= row.columns; start += kTogether, column += kTogether) {
    const T *const from = row.logits + column, *const ref = kSums & kSumsReference ? row.ref + column : nullptr;
    Packed<T> x[kLoads], r[kSums & kSumsReference ? kLoads : 1];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      x[k] = load_whole<kOnce>(from + k * Crew::kStep);
      if (kSums & kSumsReference) r[k] = load_whole<kOnce>(ref + k * Crew::kStep);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      add_packed<T, kSums>(s[k % Crew::kPerThread], x[k], r[kSums & kSumsReference ? k : 0], column + k * Crew::kStep,
                           row);
  }
  if (row.wide && start < row.columns) {
    // The whole groups of the last step. Their loads too are issued before the arithmetic, because a row of 32000
    // columns would else wait for memory as often here as in all of the loop above.
    const T *const from = row.logits + column, *const ref = kSums & kSumsReference ? row.ref + column : nullptr;
    Packed<T> x[kLoads], r[kSums & kSumsReference ? kLoads : 1];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (column + k * Crew::kStep + kGroup <= row.columns) {
        x[k] = load_whole<kOnce>(from + k * Crew::kStep);
        if (kSums & kSumsReference) r[k] = load_whole<kOnce>(ref + k * Crew::kStep);
      }
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (column + k * Crew::kStep + kGroup <= row.columns)
        add_packed<T, kSums>(s[k % Crew::kPerThread], x[k], r[kSums & kSumsReference ? k : 0], column + k * Crew::kStep,
                             row);
    if (row.columns % kGroup == 0) return;
  }
#pragma unroll 1
  for (; start < row.columns; start += kStripe, column += kStripe) {  // a part of a group, or a row without wide loads
#pragma unroll
    for (int k = 0; k < Crew::kPerThread; ++k) {
      const long long at = column + k * Crew::kStep;
      if (at >= row.columns || (row.wide && at + kGroup <= row.columns)) continue;
      const Packed<T> x = load_group<kOnce>(row.logits, at, row.columns, false);
      const Packed<T> r = kSums & kSumsReference ? load_group<kOnce>(row.ref, at, row.columns, false) : x;
      add_packed<T, kSums>(s[k], x, r, at, row);
    }
  }
}

__device__ __forceinline__ float logp_from(float logit, float row_max, float sum_exp, float inverse_temperature) {
  return (logit - row_max) * inverse_temperature - logf(sum_exp);
}
__device__ __forceinline__ float entropy_from(const Sums& s) {
  return logf(s.sum_exp) - kLn2 * (s.weighted_sum / s.sum_exp);
}

__device__ inline void zero_outputs(const StatsOutputs& out, long long r) {
  put(out.logp, r, 0), put(out.row_max, r, 0), put(out.sum_exp, r, 0), put(out.entropy, r, 0),
      put(out.log_sum_sq, r, 0);
  put(out.mean_logits, r, 0), put(out.ref_logp, r, 0), put(out.ref_row_max, r, 0), put(out.ref_sum_exp, r, 0),
      put(out.kl, r, 0);
  if (out.is_top1) pointer<unsigned char>(out.is_top1)[r] = 0;
}

// Threads of a row. Four rows of 256 threads hide each other's ends better than two of 512. They need the registers of
// a short list of sums and of 16-bit loads.
template <class T, unsigned kSums>
constexpr int kRowThreads = sizeof(T) == 2 && !(kSums & (kSumsExtra | kSumsReference)) ? 256 : 512;

template <class T, unsigned kSums, int BLOCK>
__global__ void __launch_bounds__(BLOCK,
                                  kSums& kSumsExtra || (kSums & kSumsReference && sizeof(T) == 4) ? 1 : 1024 / BLOCK)
    token_stats(const Rows rows, const StatsOutputs out) {
  using Crew = Team<BLOCK, 1>;
  CUDA_DYN_SHARED(float, records);
  const long long r = blockIdx.x, y = rows.target(r);
  if (y == rows.ignore_index) {  // a dead row is not read, and its outputs are 0
    if (threadIdx.x == 0) zero_outputs(out, r);
    return;
  }
  const float inverse_temperature = rows.inverse_temperature_of(r);
  const Row<T> row = row_of<T>(rows, r, inverse_temperature);
  Sums lanes[Crew::kPerThread];
  sweep<T, kSums, true, Crew>(lanes, row);
  Sums s = Crew::template reduce<kSums>(lanes, records, row.scale);
  if (threadIdx.x != 0) return;
  // NaN for a target outside the vocabulary, because only a host synchronisation could report it.
  if (!rows.holds(y)) s.row_max = s.sum_exp = s.logit_sum = s.ref_row_max = s.ref_sum_exp = NAN;
  put(out.logp, r, logp_from(logit_of(rows, row.logits, row.mask, y), s.row_max, s.sum_exp, inverse_temperature));
  put(out.row_max, r, s.row_max);
  put(out.sum_exp, r, s.sum_exp);
  if (kSums & kSumsWeighted) put(out.entropy, r, entropy_from(s));
  if (kSums & kSumsExtra) {
    put(out.log_sum_sq, r, logf(s.square_sum) - 2 * logf(s.sum_exp));
    put(out.mean_logits, r, s.logit_sum / s.count * inverse_temperature);
    if (out.is_top1)
      pointer<unsigned char>(out.is_top1)[r] = s.first_max == y && s.sum_exp < INFINITY;  // false for NaN
  }
  if (kSums & kSumsReference) {
    put(out.ref_logp, r,
        logp_from(logit_of(rows, row.ref, row.mask, y), s.ref_row_max, s.ref_sum_exp, inverse_temperature));
    put(out.ref_row_max, r, s.ref_row_max);
    put(out.ref_sum_exp, r, s.ref_sum_exp);
    put(out.kl, r, kLn2 * (s.cross_sum / s.sum_exp) - logf(s.sum_exp) + logf(s.ref_sum_exp));
  }
}

}  // namespace rlk
