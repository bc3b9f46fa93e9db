// The statistics of a row: log-probability, entropy and the rest, from the sums of rows.cpp in double and rounded once.
#include "arguments.h"

namespace rlk {

RowSums sums_of_row(const Batch& batch, const RowKernels& kernels, const void* row, const void* ref, double ref_row_max,
                    int64_t r, unsigned wanted) {
  RowSums sums;
  kernels.sums({row, ref, batch.mask_row(r), batch.columns, batch.temperature_of(r), ref_row_max, wanted}, sums);
  return sums;
}

double logp_of(const Batch& batch, const void* row, const RowSums& sums, int64_t r) {
  const int64_t y = batch.target(r);
  const double x = batch.supports(r, y) ? batch.value(row, y) : -HUGE_VAL;
  return (x - sums.row_max) / batch.temperature_of(r) - std::log(sums.sum_exp);
}

double entropy_of(const RowSums& sums, double temperature) {
  return std::log(sums.sum_exp) - sums.weighted_sum / sums.sum_exp / temperature;
}

namespace {

// Whether the target is the first column that holds the maximum.
bool is_first_maximum(const Batch& batch, const void* row, const RowSums& sums, int64_t r) {
  const int64_t y = batch.target(r);
  if (!std::isfinite(sums.sum_exp) || !batch.supports(r, y) || batch.value(row, y) != sums.row_max) return false;
  for (int64_t c = 0; c < y; ++c)
    if (batch.supports(r, c) && batch.value(row, c) == sums.row_max) return false;
  return true;
}

// The mean over the support, in eight sums side by side, so that the order does not depend on the dtype.
template <class T>
double mean(const T* row, const uint8_t* mask, int64_t columns) {
  double sums[8] = {};
  int64_t count = columns;
  for (int64_t c = 0; !mask && c < columns; ++c) sums[c % 8] += widen(row[c]);
  if (mask) count = 0;
  for (int64_t c = 0; mask && c < columns; ++c) {
    sums[c % 8] += mask[c] ? double(widen(row[c])) : 0.0;
    count += mask[c] != 0;
  }
  return (((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))) / double(count);
}

double mean_of_row(const Batch& batch, const void* row, int64_t r) {
  switch (batch.dtype) {
    case Dtype::f64: return mean(static_cast<const double*>(row), batch.mask_row(r), batch.columns);
    case Dtype::bf16: return mean(static_cast<const Bf16*>(row), batch.mask_row(r), batch.columns);
    case Dtype::f16: return mean(static_cast<const F16*>(row), batch.mask_row(r), batch.columns);
    default: return mean(static_cast<const float*>(row), batch.mask_row(r), batch.columns);
  }
}

}  // namespace

template <class Real>
void token_stats(const Batch& batch, const StatsOutputs& out) {
  const RowKernels kernels = row_kernels(batch.dtype);
  const unsigned wanted = out.wanted();
  for_rows(batch.rows, batch.columns, batch.threads, [&](int64_t r) {
    const auto put = [r](uintptr_t to, double x) {
      if (to) pointer<Real>(to)[r] = Real(x);
    };
    if (batch.target(r) == batch.ignore_index) {
      for (const uintptr_t to : {out.logp, out.row_max, out.sum_exp, out.entropy, out.log_sum_sq, out.mean_logits,
                                 out.ref_logp, out.ref_row_max, out.ref_sum_exp, out.kl})
        put(to, 0);
      if (out.is_top1) reinterpret_cast<uint8_t*>(out.is_top1)[r] = 0;
      return;
    }
    const double temperature = batch.temperature_of(r);
    const void *row = batch.row(r), *ref = batch.ref_row(r);
    RowSums q{};
    // The reference comes first, because its row_max is needed beside the policy's exponentials.
    if (ref) {
      q = sums_of_row(batch, kernels, ref, nullptr, 0, r, 0);
      put(out.ref_logp, logp_of(batch, ref, q, r));
      put(out.ref_row_max, q.row_max);
      put(out.ref_sum_exp, q.sum_exp);
    }
    const RowSums p = sums_of_row(batch, kernels, row, ref, q.row_max, r, wanted);
    put(out.logp, logp_of(batch, row, p, r));
    put(out.row_max, p.row_max);
    put(out.sum_exp, p.sum_exp);
    put(out.entropy, entropy_of(p, temperature));
    put(out.log_sum_sq, std::log(p.square_sum) - 2 * std::log(p.sum_exp));
    put(out.kl, p.cross_sum / p.sum_exp / temperature - std::log(p.sum_exp) + std::log(q.sum_exp));
    if (out.mean_logits) put(out.mean_logits, mean_of_row(batch, row, r) / temperature);
    if (out.is_top1) reinterpret_cast<uint8_t*>(out.is_top1)[r] = is_first_maximum(batch, row, p, r);
  });
}

template void token_stats<float>(const Batch&, const StatsOutputs&);
template void token_stats<double>(const Batch&, const StatsOutputs&);

}  // namespace rlk
