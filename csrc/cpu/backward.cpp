// The gradient of the logits of a row, from its statistics and the upstream gradients of logp, entropy and KL.
#include "arguments.h"

namespace rlk {

template <class Real>
void write_gradient(const Batch& batch, const RowKernels& kernels, int64_t r, void* out, const SavedRow<Real>& state,
                    const Upstream<double>& upstream, bool stream) {
  const void *row = batch.row(r), *ref = batch.ref_row(r);
  const int64_t y = batch.target(r);
  const double temperature = batch.temperature_of(r), row_max = state.row_max, sum_exp = state.sum_exp,
               log_sum = std::log(sum_exp);
  const bool inside = batch.supports(r, y);
  // A target outside the support moves nothing.
  const double dlogp = inside ? upstream.logp : 0;
  if (dlogp == 0 && upstream.entropy == 0 && upstream.kl == 0) {  // not read, because 0 times its NaN would be NaN
    std::memset(out, 0, size_t(batch.columns * batch.bytes()));
    return;
  }
  // Every term is p times a number linear in x and in the reference's r. A term whose upstream gradient is 0 is left
  // out and not multiplied, because its statistics may be NaN.
  double flat = -dlogp, slope = 0, cross = 0;
  if (upstream.entropy != 0) {
    flat -= upstream.entropy * (double(state.entropy) - log_sum);
    slope = -upstream.entropy / temperature;
  }
  double ref_row_max = 0;
  if (upstream.kl != 0) {
    ref_row_max = state.ref_row_max;
    flat += upstream.kl * (std::log(double(state.ref_sum_exp)) - log_sum - double(state.kl));
    cross = upstream.kl / temperature;
  }
  // The target's element is formed now, before any rounding and before an in-place store can overwrite its logit.
  double at_target = 0;
  if (inside) {
    const double d = batch.value(row, y) - row_max, p = std::exp(d / temperature) / sum_exp;
    double rest = p * flat;
    if (p != 0 && slope != 0) rest += p * slope * d;
    if (p != 0 && cross != 0) rest += p * cross * (d - (batch.value(ref, y) - ref_row_max));
    at_target = (dlogp + rest) / temperature;
    if (slope == 0 && cross == 0) at_target = dlogp * (1 - p) / temperature;
  }
  // An absent term stays 0 where the scale is NaN, because a term that is not 0 makes the kernel read the reference.
  const double scale = 1 / (sum_exp * temperature);
  if (slope != 0) slope *= scale;
  if (cross != 0) cross *= scale;
  kernels.gradient({row, ref, batch.mask_row(r), out, batch.columns, temperature, row_max, ref_row_max, flat * scale,
                    slope, cross, stream});
  if (inside) batch.set(out, y, at_target);
}

template void write_gradient(const Batch&, const RowKernels&, int64_t, void*, const SavedRow<float>&,
                             const Upstream<double>&, bool);
template void write_gradient(const Batch&, const RowKernels&, int64_t, void*, const SavedRow<double>&,
                             const Upstream<double>&, bool);

template <class Real>
void token_stats_backward(const Batch& batch, const BackwardInputs& in, const Layout& out) {
  const RowKernels kernels = row_kernels(batch.dtype);
  const bool stream = streams(batch, out);
  for_rows(batch.rows, batch.columns, batch.threads, [&](int64_t r) {
    const auto get = [r](uintptr_t from) { return from ? pointer<const Real>(from)[r] : Real(0); };
    const Upstream<double> upstream{double(get(in.dlogp)), double(get(in.dentropy)), double(get(in.dkl))};
    void* to = out.row(r, batch.bytes());
    // A dead row is not read, so that nothing in it can reach the loss. Its gradient is written, because fresh memory
    // holds garbage.
    if (batch.target(r) == batch.ignore_index) return (void)std::memset(to, 0, size_t(batch.columns * batch.bytes()));
    const SavedRow<Real> state{get(in.row_max),     get(in.sum_exp),     get(in.entropy),
                               get(in.ref_row_max), get(in.ref_sum_exp), get(in.kl)};
    write_gradient(batch, kernels, r, to, state, upstream, stream);
  });
}

template void token_stats_backward<float>(const Batch&, const BackwardInputs&, const Layout&);
template void token_stats_backward<double>(const Batch&, const BackwardInputs&, const Layout&);

}  // namespace rlk
