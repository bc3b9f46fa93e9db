// An objective over columns of numbers: its values, its derivatives and their weighted sum. The functor is a template
// argument, so that it is inlined in the loop.
#include <vector>

#include "../column_inputs.h"
#include "arguments.h"

namespace rlk {
namespace {

// Elements per partial sum. Fixed, so that the sum does not depend on the number of threads.
constexpr int64_t kPart = 4096;

template <class Real>
struct Job {
  const Real* columns[kMaxColumns];
  Real params[kMaxColumns];
  const Real* weight;
  Real *value, *derivative;
  const Real* minus[2];
  const uint8_t* mask;
  Real factor;
  Real* opposite;
  bool of_loss;
};

template <class F, class Real, size_t... C, size_t... P>
double part(const Job<Real>& job, int64_t begin, int64_t end, std::index_sequence<C...>, std::index_sequence<P...>) {
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Real weight = weight_at(job, job.factor, i);
    Term<Real> term{0, 0};
    if (weight != 0) {
      term = F{}(column<C>(job, i)..., job.params[P]...);
      sum += double(weight) * double(term.value);
    }
    const Real slope = job.of_loss ? weight * term.derivative : term.derivative;
    if (job.value) job.value[i] = term.value;
    job.derivative[i] = slope;
    if (job.opposite) job.opposite[i] = -slope;
  }
  return sum;
}

template <class F, int C, int P, class Real>
double run(const Job<Real>& job, int64_t n, int threads) {
  const int64_t parts = (n + kPart - 1) / kPart;
  const auto one = [&](int64_t k) {
    const int64_t end = (k + 1) * kPart < n ? (k + 1) * kPart : n;
    return part<F>(job, k * kPart, end, std::make_index_sequence<C>{}, std::make_index_sequence<P>{});
  };
  if (parts <= 1) return parts ? one(0) : 0.0;
  std::vector<double> sums(static_cast<size_t>(parts));
  const auto mode = float_mode();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FloatMode as_the_caller(mode);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < parts; ++k) sums[size_t(k)] = one(k);
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace

template <class Real>
Real elementwise(const char* objective, const uintptr_t* columns, const double* params, const Real* weight, Real* value,
                 Real* derivative, int64_t n, int threads, const OfLoss* of_loss) {
  const Objective<Real>& found = *find_objective<Real>(objective);
  Job<Real> job{{}, {}, weight, value, derivative, {}, nullptr, Real(1), nullptr, of_loss != nullptr};
  if (of_loss) {
    for (int k = 0; k < 2; ++k) job.minus[k] = reinterpret_cast<const Real*>(of_loss->minus[k]);
    job.mask = of_loss->mask;
    job.factor = (of_loss->total ? Real(1.0 / double(*of_loss->total)) : Real(1)) * Real(of_loss->share);
    job.opposite = reinterpret_cast<Real*>(of_loss->opposite);
  }
  for (int k = 0; k < found.columns; ++k) job.columns[k] = reinterpret_cast<const Real*>(columns[k]);
  for (int k = 0; k < found.params; ++k) job.params[k] = Real(params[k]);
#define RLK_RUN(name, columns, params) \
  if (std::strcmp(objective, #name) == 0) return Real(run<rlk::name, columns, params>(job, n, threads));
  RLK_OBJECTIVES(RLK_RUN)
#undef RLK_RUN
  return 0;
}

template float elementwise(const char*, const uintptr_t*, const double*, const float*, float*, float*, int64_t, int,
                           const OfLoss*);
template double elementwise(const char*, const uintptr_t*, const double*, const double*, double*, double*, int64_t, int,
                            const OfLoss*);

}  // namespace rlk
