// The divergence of a row of the student from that of its teacher, and the gradient of the student's logits, in one
// visit. Both rows are read from memory once, because they are still in cache for the gradient.
#include "arguments.h"

namespace rlk {
namespace {

// What a row gives: its divergence, and what its gradient starts from.
struct Compared {
  RowSums p, q;
  double value, own;  // own = KL(p || M), or KL(p || q) of the reverse divergence
};

PairJob pair_of(const Batch& batch, int64_t r, const Compared& of, double beta) {
  PairJob job{};
  job.row = batch.row(r), job.ref = batch.ref_row(r), job.mask = batch.mask_row(r), job.columns = batch.columns;
  job.temperature = batch.temperature_of(r);
  job.row_max = of.p.row_max, job.sum_exp = of.p.sum_exp;
  job.ref_row_max = of.q.row_max, job.ref_sum_exp = of.q.sum_exp;
  job.beta = beta, job.own = of.own;
  return job;
}

// KL of the first row from the second, from the first one's sums with the second as their reference.
double kl_of(const RowSums& first, const RowSums& second, double temperature) {
  return first.cross_sum / first.sum_exp / temperature - std::log(first.sum_exp) + std::log(second.sum_exp);
}

Compared compare(const Batch& batch, const RowKernels& kernels, int64_t r, Divergence kind, double beta) {
  const void *row = batch.row(r), *ref = batch.ref_row(r);
  const double temperature = batch.temperature_of(r);
  Compared of{};
  if (kind == Divergence::reverse_kl) {
    of.q = sums_of_row(batch, kernels, ref, nullptr, 0, r, 0);
    of.p = sums_of_row(batch, kernels, row, ref, of.q.row_max, r, kKl);
    of.value = of.own = kl_of(of.p, of.q, temperature);
    return of;
  }
  of.p = sums_of_row(batch, kernels, row, nullptr, 0, r, 0);
  if (kind == Divergence::jsd) {
    of.q = sums_of_row(batch, kernels, ref, nullptr, 0, r, 0);
    double others = 0;
    kernels.mixture_sums(pair_of(batch, r, of, beta), &of.own, &others);
    of.value = beta * others + (1 - beta) * of.own;
    return of;
  }
  of.q = sums_of_row(batch, kernels, ref, row, of.p.row_max, r, kKl);
  of.value = kl_of(of.q, of.p, temperature);
  if (kind == Divergence::cross_entropy) of.value += entropy_of(of.q, temperature);
  return of;
}

void write(const Batch& batch, const RowKernels& kernels, int64_t r, const Compared& of, Divergence kind, double beta,
           double weight, void* out, bool stream) {
  const double temperature = batch.temperature_of(r);
  if (kind == Divergence::reverse_kl) {
    const double per_sum = weight / (of.p.sum_exp * temperature);
    const double flat = std::log(of.q.sum_exp) - std::log(of.p.sum_exp) - of.value;
    kernels.gradient({batch.row(r), batch.ref_row(r), batch.mask_row(r), out, batch.columns, temperature, of.p.row_max,
                      of.q.row_max, flat * per_sum, 0, per_sum / temperature, stream});
    return;
  }
  PairJob job = pair_of(batch, r, of, kind == Divergence::jsd ? beta : 0);
  job.scale = weight / temperature * (kind == Divergence::jsd ? 1 - beta : 1);
  job.out = out, job.stream = stream;
  kernels.pair_gradient(job);
}

}  // namespace

template <class Real>
void divergence(const Batch& batch, Divergence kind, double beta, uintptr_t weights, uintptr_t values,
                const Layout& out) {
  const RowKernels kernels = row_kernels(batch.dtype);
  const bool stream = streams(batch, out);
  for_rows(batch.rows, batch.columns, batch.threads, [&](int64_t r) {
    void* to = out.address ? out.row(r, batch.bytes()) : nullptr;
    const double weight = to ? double(pointer<const Real>(weights)[r]) : 0;
    const bool dead = batch.target(r) == batch.ignore_index;
    Compared of{};
    if (!dead) of = compare(batch, kernels, r, kind, beta);
    pointer<Real>(values)[r] = Real(of.value);
    if (!to) return;
    // A row of weight 0 is left out by branch, because 0 times its NaN would be NaN.
    if (dead || weight == 0) return (void)std::memset(to, 0, size_t(batch.columns * batch.bytes()));
    write(batch, kernels, r, of, kind, beta, weight, to, stream);
  });
}

template void divergence<float>(const Batch&, Divergence, double, uintptr_t, uintptr_t, const Layout&);
template void divergence<double>(const Batch&, Divergence, double, uintptr_t, uintptr_t, const Layout&);

}  // namespace rlk
