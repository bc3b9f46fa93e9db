// The sums over a row. Each block gives its maximum first, then its exponentials, measured from the largest logit so
// far. Lanes are summed in fp32 inside a block and in double across blocks. A dtype changes how a column is loaded and
// never the lane that the column is added to, so that the same values give the same bits whatever their dtype, address
// and stride.
#pragma once
#include "blocks.h"
#include "rows.h"

namespace rlk {
namespace RLK_ISA {
namespace {

struct BlockSums {
  Vec sum_exp[2 * kPairs], weighted_sum[2 * kPairs], square_sum[2 * kPairs], cross_sum[2 * kPairs], peaks;
};

// kPeak: the block holds the maximum. Its exponential is 1, and is counted and not added, because a lane that holds a 1
// forgets what is below 2^-25. That is most of the rest where a token has probability .9999.
template <unsigned kWanted, bool kPeak, class X>
RLK_INLINE void add_chunk(BlockSums& to, const X* x, const X* r, const Exponential& exponential, Vec row_max,
                          Vec ref_row_max) {
  Vec d[2 * kPairs], e[2 * kPairs];
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) {
    const Pair at = load(x + k * kPair);
    d[2 * k] = exponential.bound(at.a - row_max), d[2 * k + 1] = exponential.bound(at.b - row_max);
  }
  exponential(d, e);
  RLK_UNROLL_FOR (int k = 0; k < 2 * kPairs; ++k) {
    const Vec below = kPeak ? (d[k] == 0.0f ? Vec{} : e[k]) : e[k];
    if (kPeak) to.peaks += d[k] == 0.0f ? all(1.0f) : Vec{};
    to.sum_exp[k] += below;
    if (kWanted & kEntropy) to.weighted_sum[k] = fma(d[k], e[k], to.weighted_sum[k]);
    if (kWanted & kLogSumSq) to.square_sum[k] = fma(below, below, to.square_sum[k]);
  }
  if (kWanted & kKl)
    RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) {
      // The reference does not matter where p is 0. The divergence is +inf where only q is 0.
      const Pair at = load(r + k * kPair);
      const Vec a = e[2 * k] * (d[2 * k] - (at.a - ref_row_max)),
                b = e[2 * k + 1] * (d[2 * k + 1] - (at.b - ref_row_max));
      to.cross_sum[2 * k] += e[2 * k] == 0.0f ? Vec{} : a;
      to.cross_sum[2 * k + 1] += e[2 * k + 1] == 0.0f ? Vec{} : b;
    }
}

template <unsigned kWanted, bool kPeak, class X>
RLK_INLINE void add_block(BlockSums& to, const X* x, const X* r, int64_t n, const Exponential& exponential, Vec row_max,
                          Vec ref_row_max) {
  const int64_t whole = n - n % kChunk;
  for (int64_t c = 0; c < whole; c += kChunk) {
    // Fetches the next block under the arithmetic of this one.
    const char* next = reinterpret_cast<const char*>(x + c) + kBlock * int64_t(sizeof(X));
    RLK_UNROLL_FOR (int64_t byte = 0; byte < int64_t(kChunk * sizeof(X)); byte += 64) __builtin_prefetch(next + byte);
    add_chunk<kWanted, kPeak>(to, x + c, kWanted & kKl ? r + c : r, exponential, row_max, ref_row_max);
  }
  if (whole == n) return;
  X x_rest[kChunk], r_rest[kChunk];
  padded(x_rest, x + whole, n - whole);
  if (kWanted & kKl) padded(r_rest, r + whole, n - whole);
  add_chunk<kWanted, kPeak>(to, x_rest, r_rest, exponential, row_max, ref_row_max);
}

RLK_INLINE void fold(Doubles& total, const Vec (&v)[2 * kPairs]) {
  total += __builtin_convertvector((v[0] + v[1]) + (v[2] + v[3]), Doubles);
}

RLK_INLINE double add_lanes(const Doubles& v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

template <unsigned kWanted, bool kMasked, class X>
void row_sums(const SumsJob& job, RowSums& out) {
  const X *row = static_cast<const X*>(job.row), *ref = static_cast<const X*>(job.ref);
  const Exponential exponential = Exponential::times(1, job.temperature);
  Doubles sum_exp{}, weighted_sum{}, square_sum{}, cross_sum{};
  double peaks = 0;
  // The largest logits so far. The reference has its own, so that the divergence of a row from itself is exactly 0.
  float row_max = kNone, ref_row_max = kNone;
  for (int64_t c = 0; c < job.columns; c += kBlock) {
    const int64_t n = job.columns - c < kBlock ? job.columns - c : kBlock;
    X support[kMasked ? kBlock : 1];
    const X* x = kMasked ? stage(support, row + c, job.mask + c, n) : row + c;
    const float candidate = block_max(x, n);
    double ref_step = 0;
    if (kWanted & kKl) {
      X ref_support[kMasked ? kBlock : 1];
      const float ref_candidate = block_max(kMasked ? stage(ref_support, ref + c, job.mask + c, n) : ref + c, n);
      if (ref_candidate > ref_row_max) {
        // Columns before the reference's first finite one count 0 or infinity, so that there is nothing to move.
        if (ref_row_max != kNone) ref_step = double(ref_candidate) - double(ref_row_max);
        ref_row_max = ref_candidate;
      }
    }
    if (candidate > row_max) {
      if (row_max != kNone) {  // before the first finite column there is nothing to rescale
        const double step = double(row_max) - double(candidate), shrink = ::exp(step / job.temperature);
        sum_exp[0] += peaks;  // they are like any other column now
        if (kWanted & kLogSumSq) square_sum[0] += peaks;
        peaks = 0;
        if (kWanted & kEntropy) weighted_sum = shrink * (weighted_sum + step * sum_exp);
        if (kWanted & kLogSumSq) square_sum *= shrink * shrink;
        if (kWanted & kKl) cross_sum = shrink * (cross_sum + (step + ref_step) * sum_exp);
        sum_exp *= shrink;
      }
      row_max = candidate;
    } else if ((kWanted & kKl) && ref_step != 0) {
      cross_sum[0] += ref_step * peaks;
      cross_sum += ref_step * sum_exp;
    }
    BlockSums sums{};
    // -inf - 0 counts as nothing, where (-inf) - (-inf) would be NaN.
    const Vec from = all(row_max == kNone ? 0.0f : row_max);
    const Vec ref_from = all(ref_row_max == kNone ? 0.0f : ref_row_max);
    const X* r = kWanted & kKl ? ref + c : ref;
    if (candidate == row_max) {
      add_block<kWanted, true>(sums, x, r, n, exponential, from, ref_from);
      peaks += add_lanes(__builtin_convertvector(sums.peaks, Doubles));
    } else {
      add_block<kWanted, false>(sums, x, r, n, exponential, from, ref_from);
    }
    fold(sum_exp, sums.sum_exp);
    if (kWanted & kEntropy) fold(weighted_sum, sums.weighted_sum);
    if (kWanted & kLogSumSq) fold(square_sum, sums.square_sum);
    if (kWanted & kKl) fold(cross_sum, sums.cross_sum);
  }
  // Adds 0, because it must not show which of the two zeros a row holds first.
  out = {double(row_max) + 0.0, peaks + add_lanes(sum_exp), add_lanes(weighted_sum), peaks + add_lanes(square_sum),
         add_lanes(cross_sum)};
  // Asks the sum for a NaN, because it depends on the order of columns whether the maximum met one.
  if (row_max == kNone || out.sum_exp != out.sum_exp) out.row_max = out.sum_exp = __builtin_nan("");
}

// Few combinations are compiled. sum_exp alone and the entropy are the hot ones, and the rest share two.
template <bool kMasked, class X>
void sums_of(const SumsJob& job, RowSums& out) {
  if (job.wanted & kKl) return row_sums<kEntropy | kLogSumSq | kKl, kMasked, X>(job, out);
  if (job.wanted & kLogSumSq) return row_sums<kEntropy | kLogSumSq, kMasked, X>(job, out);
  if (job.wanted & kEntropy) return row_sums<kEntropy, kMasked, X>(job, out);
  return row_sums<0, kMasked, X>(job, out);
}

template <class X>
void sums(const SumsJob& job, RowSums& out) {
  job.mask ? sums_of<true, X>(job, out) : sums_of<false, X>(job, out);
}

}  // namespace
}  // namespace RLK_ISA
}  // namespace rlk
