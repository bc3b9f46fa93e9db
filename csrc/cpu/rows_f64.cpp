// The kernels of one row for float64. Plain loops over the C library's exp, because they serve gradcheck and reference
// runs and not training.
#include <limits>

#include "rows.h"

namespace rlk {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

// Column c of the support, or -inf outside it.
double column(const double* row, const uint8_t* mask, int64_t c) { return mask && !mask[c] ? kNone : row[c]; }

void sums(const SumsJob& job, RowSums& out) {
  const double* row = static_cast<const double*>(job.row);
  const double* ref = static_cast<const double*>(job.ref);
  out = {kNone, 0, 0, 0, 0};
  for (int64_t c = 0; c < job.columns; ++c) {
    const double x = column(row, job.mask, c);
    if (x > out.row_max) out.row_max = x;
  }
  for (int64_t c = 0; c < job.columns; ++c) {
    const double x = column(row, job.mask, c);
    if (x == kNone) continue;
    const double d = x - out.row_max, e = std::exp(d / job.temperature);
    out.sum_exp += e;
    out.weighted_sum += e == 0 ? 0 : e * d;
    out.square_sum += e * e;
    if (job.wanted & kKl) out.cross_sum += e == 0 ? 0 : e * (d - (ref[c] - job.ref_row_max));
  }
  if (out.row_max == kNone || out.sum_exp != out.sum_exp)
    out.row_max = out.sum_exp = std::numeric_limits<double>::quiet_NaN();
  out.row_max += 0.0;
}

void gradient(const GradientJob& job) {
  const double* row = static_cast<const double*>(job.row);
  const double* ref = static_cast<const double*>(job.ref);
  double* out = static_cast<double*>(job.out);
  for (int64_t c = 0; c < job.columns; ++c) {
    const double d = column(row, job.mask, c) - job.row_max, e = std::exp(d / job.temperature);
    double g = e * job.flat;
    if (job.slope != 0 && e != 0) g += e * job.slope * d;
    if (job.cross != 0 && e != 0) g += e * job.cross * (d - (ref[c] - job.ref_row_max));
    out[c] = job.mask && !job.mask[c] ? 0 : g;
  }
}

// The probabilities of one column, and log(M / p). Where p is 0, M is beta q.
struct Mixed {
  double p, q, u, ratio;  // ratio = log(q / M)
};

Mixed mixed(const PairJob& job, int64_t c) {
  const double d = column(static_cast<const double*>(job.row), job.mask, c) - job.row_max,
               ref_d = column(static_cast<const double*>(job.ref), job.mask, c) - job.ref_row_max;
  const double p = std::exp(d / job.temperature) / job.sum_exp, q = std::exp(ref_d / job.temperature) / job.ref_sum_exp;
  if (p < 1e-300) return {p, q, 0, q == 0 ? 0 : -std::log(job.beta)};
  const double u = std::log1p(job.beta * (q / p - 1));
  const double gap = (ref_d - d) / job.temperature + std::log(job.sum_exp) - std::log(job.ref_sum_exp);
  return {p, q, u, q == 0 ? 0 : gap - u};
}

void mixture_sums(const PairJob& job, double* own, double* others) {
  *own = *others = 0;
  for (int64_t c = 0; c < job.columns; ++c) {
    const Mixed m = mixed(job, c);
    *own -= m.p * m.u, *others += m.q * m.ratio;
  }
}

void pair_gradient(const PairJob& job) {
  double* out = static_cast<double*>(job.out);
  for (int64_t c = 0; c < job.columns; ++c) {
    const Mixed m = mixed(job, c);
    const double g = job.beta > 0 ? m.p * (-m.u - job.own) : m.p - m.q;
    out[c] = job.mask && !job.mask[c] ? 0 : job.scale * g;
  }
}

}  // namespace

RowKernels row_kernels_f64() { return {sums, gradient, mixture_sums, pair_gradient}; }

}  // namespace rlk
