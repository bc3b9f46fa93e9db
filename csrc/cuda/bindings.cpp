// The Python module _cuda. Only numbers cross, addresses among them. Python keeps shapes, dtypes and allocation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../interface.h"
#include "../tensors.h"
#include "launchers.h"

namespace py = pybind11;
using namespace rlk;

namespace {

using Place = std::array<long long, 4>;  // address, outer, inner, level

Layout layout(const Place& p) { return {uintptr_t(p[0]), p[1], p[2], p[3]}; }

Rows rows(int dtype, long long rows, long long columns, const Place& logits, const Place& ref, uintptr_t targets,
          long long target_stride, int target_bytes, long long ignore_index, float inverse_temperature,
          uintptr_t temperatures, uintptr_t mask, long long mask_stride) {
  return {Dtype(dtype), rows,          columns,      layout(logits), layout(ref),
          targets,      target_stride, target_bytes, ignore_index,   inverse_temperature,
          temperatures, mask,          mask_stride};
}

// Calls `run` with the dtype as a template argument.
template <class F>
void by_dtype(Dtype dtype, F run) {
  switch (dtype) {
    case Dtype::f32: return run(std::integral_constant<Dtype, Dtype::f32>());
    case Dtype::bf16: return run(std::integral_constant<Dtype, Dtype::bf16>());
    case Dtype::f16: return run(std::integral_constant<Dtype, Dtype::f16>());
    default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  }
}

// Calls `run` with the dtype of the logits and that of their gradient as template arguments.
template <class F>
void by_dtypes(Dtype dtype, Dtype out, F run) {
  using F32 = std::integral_constant<Dtype, Dtype::f32>;
  if (dtype == out) return by_dtype(dtype, [&](auto d) { run(d, d); });
  if (dtype == Dtype::f32 && out == Dtype::bf16) return run(F32(), std::integral_constant<Dtype, Dtype::bf16>());
  if (dtype == Dtype::f32 && out == Dtype::f16) return run(F32(), std::integral_constant<Dtype, Dtype::f16>());
  throw std::invalid_argument("a gradient has the dtype of its logits, or these are float32");
}

void stats(const Rows& r, const std::array<uintptr_t, 11>& to, int device, uintptr_t stream) {
  const StatsOutputs out{to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], to[8], to[9], to[10]};
  by_dtype(r.dtype, [&](auto d) { token_stats<decltype(d)::value>(r, out, {device, stream}); });
}

void backward(const Rows& r, const std::array<uintptr_t, 10>& from, const Place& out, int dtype, int device,
              uintptr_t stream) {
  const BackwardInputs in{from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7], from[8]};
  by_dtypes(r.dtype, Dtype(dtype), [&](auto d, auto o) {
    token_stats_backward<decltype(d)::value, decltype(o)::value>(r, in, from[9], layout(out), {device, stream});
  });
}

// Fills the array of a kernel argument. Throws for more than kMaxColumns numbers, because that array has a fixed size.
template <class To, class From, class Convert>
void fill(To (&to)[kMaxColumns], const std::vector<From>& from, Convert convert) {
  if (from.size() > size_t(kMaxColumns))
    throw std::invalid_argument("too many columns or parameters for one objective");
  for (size_t k = 0; k < from.size(); ++k) to[k] = convert(from[k]);
}

// Raises ValueError unless the named objective is compiled in and takes so many columns and parameters. Checked here,
// because a kernel takes addresses from the list of columns.
void check_objective(const std::string& name, size_t columns, size_t params) {
  const int id = objective_id(name.c_str());
  constexpr size_t takes[][2] = {
#define RLK_TAKES(objective, columns, params) {columns, params},
      RLK_OBJECTIVES(RLK_TAKES)
#undef RLK_TAKES
  };
  if (id < 0)
    throw py::value_error("objective '" + name + "' is not compiled into backend 'cuda'; name one that is registered");
  if (columns != takes[id][0] || params != takes[id][1])
    throw py::value_error("objective '" + name + "' takes " + std::to_string(takes[id][0]) + " columns and " +
                          std::to_string(takes[id][1]) + " parameters, got " + std::to_string(columns) + " and " +
                          std::to_string(params));
}

void policy(const Rows& r, const std::string& objective, const std::vector<uintptr_t>& columns,
            const std::vector<double>& params, uintptr_t weight, uintptr_t entropy_weight, const std::string& kl,
            uintptr_t ref_logp, uintptr_t kl_weight, const std::array<uintptr_t, 8>& to, const Place& gradient,
            int dtype, int device, uintptr_t stream) {
  check_objective(objective, columns.size() + 1, params.size());
  if (!kl.empty()) check_objective(kl, 2, 0);
  PolicyArguments in{
      objective_id(objective.c_str()), objective_id(kl.c_str()), {}, {}, {weight, entropy_weight, ref_logp, kl_weight}};
  fill(in.columns, columns, [](uintptr_t a) { return a; });
  fill(in.params, params, [](double p) { return float(p); });
  const PolicyOutputs out{to[0], to[1], to[2], to[3], to[4]};
  const LossSum total{to[5], to[6], to[7]};
  by_dtypes(r.dtype, Dtype(dtype), [&](auto d, auto o) {
    fused_policy<decltype(d)::value, decltype(o)::value>(r, in, out, total, layout(gradient), {device, stream});
  });
}

// The arguments that elementwise and weighted_loss have in common.
template <class S>
ElementwiseJob<S> elementwise_job(const std::vector<uintptr_t>& columns, const std::vector<double>& params,
                                  uintptr_t weight, uintptr_t derivative, uintptr_t loss, uintptr_t parts,
                                  uintptr_t ticket, long long n) {
  ElementwiseJob<S> job{};
  fill(job.columns, columns, [](uintptr_t a) { return pointer<const S>(a); });
  fill(job.params, params, [](double p) { return S(p); });
  job.weight = pointer<const S>(weight), job.derivative = pointer<S>(derivative), job.loss = pointer<S>(loss);
  job.parts = pointer<double>(parts), job.ticket = pointer<unsigned>(ticket), job.n = n;
  return job;
}

template <class S>
void apply(const std::string& objective, const std::vector<uintptr_t>& columns, const std::vector<double>& params,
           uintptr_t weight, uintptr_t value, uintptr_t derivative, uintptr_t loss, uintptr_t parts, uintptr_t ticket,
           long long n, int device, uintptr_t stream) {
  check_objective(objective, columns.size(), params.size());
  ElementwiseJob<S> job = elementwise_job<S>(columns, params, weight, derivative, loss, parts, ticket, n);
  job.value = pointer<S>(value);
  elementwise<S>(objective.c_str(), job, {device, stream});
}

template <class S>
void weighted(const std::string& objective, const std::vector<uintptr_t>& columns, const std::vector<uintptr_t>& minus,
              const std::vector<double>& params, uintptr_t weight, uintptr_t mask, uintptr_t total, double share,
              uintptr_t slope, uintptr_t opposite, uintptr_t loss, uintptr_t parts, uintptr_t ticket, long long n,
              int device, uintptr_t stream) {
  check_objective(objective, columns.size(), params.size());
  ElementwiseJob<S> job = elementwise_job<S>(columns, params, weight, slope, loss, parts, ticket, n);
  job.mask = pointer<const unsigned char>(mask), job.total = pointer<const int64_t>(total), job.share = S(share);
  job.opposite = pointer<S>(opposite), job.of_loss = true;
  if (minus.size() > 2) throw std::invalid_argument("at most two columns are taken from the first");
  for (size_t k = 0; k < minus.size(); ++k) job.minus[k] = pointer<const S>(minus[k]);
  elementwise<S>(objective.c_str(), job, {device, stream});
}

template <class S>
void scan(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bounds, long long sequences, long long length,
          double gamma, double lam, int masked, uintptr_t advantages, uintptr_t returns, int device, uintptr_t stream) {
  gae<S>({pointer<const S>(rewards), pointer<const S>(values), pointer<const unsigned char>(mask),
          pointer<const int64_t>(bounds), sequences, length, gamma, lam, Masked(masked), pointer<S>(advantages),
          pointer<S>(returns)},
         {device, stream});
}

void choose(int fused_cluster, long long backward_slice) { choices() = {fused_cluster, backward_slice}; }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  // Released, because a full queue makes a launch wait, and the threads that load data would wait with it.
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Rows>(m, "Rows").def(py::init(&rows));
  m.def("token_stats", &stats, Unlocked());
  m.def("token_stats_backward", &backward, Unlocked());
  m.def("fused_policy", &policy, Unlocked());
  m.def("elementwise_f32", &apply<float>, Unlocked());
  m.def("elementwise_f64", &apply<double>, Unlocked());
  m.def("weighted_loss_f32", &weighted<float>, Unlocked());
  m.def("weighted_loss_f64", &weighted<double>, Unlocked());
  m.def("elementwise_parts", &elementwise_parts);
  m.def("gae_f32", &scan<float>, Unlocked());
  m.def("gae_f64", &scan<double>, Unlocked());
  m.def("choose", &choose, py::arg("fused_cluster") = 0, py::arg("backward_slice") = 0);
  py::dict objectives;  // name -> (columns, params)
#define RLK_ENTRY(name, columns, params) objectives[#name] = py::make_tuple(columns, params);
  RLK_OBJECTIVES(RLK_ENTRY)
  m.attr("OBJECTIVES") = objectives;
  m.attr("INTERFACE") = kInterface;
  tensors::bind(m);
  m.attr("OBJECTIVES_DIGEST") = RLK_OBJECTIVES_DIGEST;
}
