// The statistics, the objective and the gradient of a row in one visit. The row is read from memory once, because it is
// still in cache for its gradient.
#include <vector>

#include "arguments.h"

namespace rlk {

template <class Real>
Real fused_policy(const Batch& batch, const PolicyArguments& in, const PolicyOutputs& out, const Layout& gradient) {
  const RowKernels kernels = row_kernels(batch.dtype);
  const Objective<Real>& objective = *find_objective<Real>(in.objective);
  const Objective<Real>* penalty = in.kl ? find_objective<Real>(in.kl) : nullptr;
  Real params[kMaxColumns] = {};
  for (int k = 0; k < objective.params; ++k) params[k] = Real(in.params[k]);
  const bool stream = streams(batch, gradient);
  std::vector<double> losses(size_t(batch.rows), 0.0);
  for_rows(batch.rows, batch.columns, batch.threads, [&](int64_t r) {
    const auto get = [r](uintptr_t from) { return from ? pointer<const Real>(from)[r] : Real(0); };
    const auto put = [r](uintptr_t to, Real x) { pointer<Real>(to)[r] = x; };
    const Real weight = get(in.per_row.weight), entropy_weight = get(in.per_row.entropy_weight),
               kl_weight = get(in.per_row.kl_weight);
    void* to = gradient.address ? gradient.row(r, batch.bytes()) : nullptr;
    if (batch.target(r) == batch.ignore_index || (weight == 0 && entropy_weight == 0 && kl_weight == 0)) {
      for (const uintptr_t at : {out.logp, out.row_max, out.sum_exp, out.entropy, out.dlogp}) put(at, 0);
      if (to) std::memset(to, 0, size_t(batch.columns * batch.bytes()));
      return;
    }
    const void* row = batch.row(r);
    const RowSums sums = sums_of_row(batch, kernels, row, nullptr, 0, r, kEntropy);
    const Real logp = Real(logp_of(batch, row, sums, r));
    SavedRow<Real> state{};
    state.row_max = Real(sums.row_max);
    state.sum_exp = Real(sums.sum_exp);
    state.entropy = Real(entropy_of(sums, batch.temperature_of(r)));
    // Terms of weight 0 are left out by branch, because 0 * NaN is NaN.
    Real dlogp = 0;
    double loss = 0;
    if (weight != 0) {
      Real columns[kMaxColumns] = {logp};
      for (int k = 1; k < objective.columns; ++k) columns[k] = get(in.columns[k - 1]);
      const Term<Real> term = objective.evaluate(columns, params);
      dlogp = weight * term.derivative;
      loss = double(weight) * double(term.value);
    }
    if (kl_weight != 0) {
      const Real columns[kMaxColumns] = {logp, get(in.per_row.ref_logp)};
      const Term<Real> term = penalty->evaluate(columns, nullptr);
      dlogp += kl_weight * term.derivative;
      loss += double(kl_weight) * double(term.value);
    }
    if (entropy_weight != 0) loss -= double(entropy_weight) * double(state.entropy);
    losses[size_t(r)] = loss;
    put(out.logp, logp);
    put(out.row_max, state.row_max);
    put(out.sum_exp, state.sum_exp);
    put(out.entropy, state.entropy);
    put(out.dlogp, dlogp);
    if (to) write_gradient(batch, kernels, r, to, state, {double(dlogp), -double(entropy_weight), 0}, stream);
  });
  double total = 0;
  for (const double loss : losses) total += loss;  // in the order of rows, so that no bit depends on the threads
  return Real(total);
}

template float fused_policy<float>(const Batch&, const PolicyArguments&, const PolicyOutputs&, const Layout&);
template double fused_policy<double>(const Batch&, const PolicyArguments&, const PolicyOutputs&, const Layout&);

}  // namespace rlk
