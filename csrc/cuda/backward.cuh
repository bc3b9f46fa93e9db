// The gradient of the logits of a slice of one row, in one read and one write. It is in place where `out` is the
// logits, because a thread stores only what it has read itself.
#pragma once
#include "gradient.cuh"

namespace rlk {

// Groups whose loads are issued before the first store. No bit depends on that number.
template <class T>
constexpr int kTogetherOf = sizeof(T) == 4 ? 2 : 4;

template <class T, class Out, bool kRef, int BLOCK>
__global__ void __launch_bounds__(BLOCK)
    token_stats_backward(const Rows rows, const BackwardInputs in, const uintptr_t unless, const Layout to,
                         const long long slices, const long long slice) {
  if (get(unless, 0) == 1.0f) return;
  constexpr int kTogether = kTogetherOf<T>;
  constexpr long long kStep = (long long)BLOCK * kGroup;
  const long long r = blockIdx.x / slices, from = blockIdx.x % slices * slice;
  const long long stop = from + slice < rows.columns ? from + slice : rows.columns;
  const long long y = rows.target(r);
  const unsigned char* mask = rows.mask_row(r);
  Out* const out = to.row<Out>(r);
  Upstream<float> up{get(in.dlogp, r), get(in.dentropy, r), get(in.dkl, r)};
  if (mask && rows.holds(y) && !mask[y]) up.logp = 0;  // a target outside the support moves nothing
  // A dead row is not read, so that nothing in it can reach the loss. Its gradient is written, because fresh memory
  // holds garbage.
  if (y == rows.ignore_index || (up.logp == 0 && up.entropy == 0 && up.kl == 0))
    return fill_zero(out, from, stop, rows.columns, int(threadIdx.x), BLOCK);
  const SavedRow<float> state{get(in.row_max, r),     get(in.sum_exp, r),     get(in.entropy, r),
                              get(in.ref_row_max, r), get(in.ref_sum_exp, r), get(in.kl, r)};
  const Slope slope = slope_of(state, up, rows.inverse_temperature_of(r));
  const T* const row = rows.logits.row<const T>(r);
  const T* const ref = kRef ? rows.ref.row<const T>(r) : row;
  const bool wide = aligned(row) && aligned(ref), wide_out = aligned(out);
  long long column = from + (long long)threadIdx.x * kGroup;
  for (; wide && wide_out && column + (kTogether - 1) * kStep + kGroup <= stop; column += kTogether * kStep) {
    Packed<T> x[kTogether], q[kRef ? kTogether : 1];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      x[k] = load_whole<true>(row + column + k * kStep);
      if (kRef) q[k] = load_whole<true>(ref + column + k * kStep);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      store_group(
          out, column + k * kStep, rows.columns, true,
          gradient_packed<T, Out, kRef>(slope, x[k], q[kRef ? k : 0], mask, column + k * kStep, rows.columns, y));
  }
#pragma unroll 1
  for (; column < stop; column += kStep) {
    const Packed<T> x = load_group<true>(row, column, rows.columns, wide);
    const Packed<T> q = kRef ? load_group<true>(ref, column, rows.columns, wide) : x;
    store_group(out, column, rows.columns, wide_out,
                gradient_packed<T, Out, kRef>(slope, x, q, mask, column, rows.columns, y));
  }
}

}  // namespace rlk
