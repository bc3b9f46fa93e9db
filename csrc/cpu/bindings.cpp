// The Python module _cpu. Only numbers cross, addresses among them. Python keeps shapes, dtypes and allocation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../interface.h"
#include "../tensors.h"
#include "arguments.h"
#include "buffer.h"
#include "gemm.h"

namespace py = pybind11;
using namespace rlk;

namespace {

using Place = std::array<int64_t, 4>;  // address, outer, inner, level

Layout layout(const Place& p) { return {uintptr_t(p[0]), p[1], p[2], p[3]}; }

Batch batch(int dtype, int64_t rows, int64_t columns, const Place& logits, const Place& ref, uintptr_t targets,
            int64_t target_stride, int64_t target_bytes, int64_t ignore_index, double temperature,
            uintptr_t temperatures, uintptr_t mask, int64_t mask_stride, int threads) {
  Batch b{Dtype(dtype), rows,        columns, layout(logits), layout(ref), {},
          ignore_index, temperature, {},      mask,           mask_stride, threads};
  b.read_targets(targets, target_stride, target_bytes);
  b.read_temperatures(temperatures);
  if (const int64_t r = b.bad_target(); r >= 0)
    throw py::index_error("target " + std::to_string(b.target(r)) + " at row " + std::to_string(r) +
                          " is outside [0, " + std::to_string(columns) + ")");
  if (const int64_t r = b.bad_temperature(); r >= 0)
    throw py::value_error("temperature must be positive and finite, got " +
                          std::string(py::str(py::float_(b.temperature_of(r)))) + " at row " + std::to_string(r) +
                          "; it may be from 2**-40 to 2**40");
  return b;
}

// Raises ValueError unless the named objective is compiled in and takes so many columns and parameters. Checked here,
// because a place in the list of columns becomes an address.
void check_objective(const std::string& name, size_t columns, size_t params) {
  const Objective<float>* found = find_objective<float>(name.c_str());
  if (!found)
    throw py::value_error("objective '" + name + "' is not compiled into backend 'cpu'; name one that is registered");
  if (columns != size_t(found->columns) || params != size_t(found->params))
    throw py::value_error("objective '" + name + "' takes " + std::to_string(found->columns) + " columns and " +
                          std::to_string(found->params) + " parameters, got " + std::to_string(columns) + " and " +
                          std::to_string(params));
}

void stats(const Batch& b, const std::array<uintptr_t, 11>& to) {
  py::gil_scoped_release release;
  const StatsOutputs out{to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], to[8], to[9], to[10]};
  b.dtype == Dtype::f64 ? token_stats<double>(b, out) : token_stats<float>(b, out);
}

void backward(const Batch& b, const std::array<uintptr_t, 9>& from, const Place& out) {
  py::gil_scoped_release release;
  const BackwardInputs in{from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7], from[8]};
  b.dtype == Dtype::f64 ? token_stats_backward<double>(b, in, layout(out))
                        : token_stats_backward<float>(b, in, layout(out));
}

void compare(const Batch& b, int kind, double beta, uintptr_t weights, uintptr_t values, const Place& out) {
  if (kind < 0 || kind > int(Divergence::cross_entropy) || !b.ref.address)
    if (b.rows) throw py::value_error("divergence: an unknown kind, or no rows of a teacher");
  py::gil_scoped_release release;
  b.dtype == Dtype::f64 ? divergence<double>(b, Divergence(kind), beta, weights, values, layout(out))
                        : divergence<float>(b, Divergence(kind), beta, weights, values, layout(out));
}

double policy(const Batch& b, const std::string& objective, const std::vector<uintptr_t>& columns,
              const std::vector<double>& params, uintptr_t weight, uintptr_t entropy_weight,
              const std::optional<std::string>& kl, uintptr_t ref_logp, uintptr_t kl_weight,
              const std::array<uintptr_t, 5>& to, const Place& gradient) {
  check_objective(objective, columns.size() + 1, params.size());
  if (kl) check_objective(*kl, 2, 0);
  py::gil_scoped_release release;
  const PolicyArguments in{objective.c_str(),
                           kl ? kl->c_str() : nullptr,
                           columns.data(),
                           params.data(),
                           {weight, entropy_weight, ref_logp, kl_weight}};
  const PolicyOutputs out{to[0], to[1], to[2], to[3], to[4]};
  return b.dtype == Dtype::f64 ? fused_policy<double>(b, in, out, layout(gradient))
                               : fused_policy<float>(b, in, out, layout(gradient));
}

template <class Real>
double apply(const std::string& objective, const std::vector<uintptr_t>& columns, const std::vector<double>& params,
             uintptr_t weight, uintptr_t value, uintptr_t derivative, int64_t n, int threads) {
  check_objective(objective, columns.size(), params.size());
  py::gil_scoped_release release;
  return elementwise<Real>(objective.c_str(), columns.data(), params.data(), pointer<const Real>(weight),
                           pointer<Real>(value), pointer<Real>(derivative), n, threads);
}

template <class Real>
double weighted(const std::string& objective, const std::vector<uintptr_t>& columns,
                const std::array<uintptr_t, 2>& minus, const std::vector<double>& params, uintptr_t weight,
                uintptr_t mask, uintptr_t total, double share, uintptr_t slope, uintptr_t opposite, int64_t n,
                int threads) {
  check_objective(objective, columns.size(), params.size());
  py::gil_scoped_release release;
  const OfLoss of_loss{
      {minus[0], minus[1]}, pointer<const uint8_t>(mask), pointer<const int64_t>(total), share, opposite};
  return elementwise<Real>(objective.c_str(), columns.data(), params.data(), pointer<const Real>(weight), nullptr,
                           pointer<Real>(slope), n, threads, &of_loss);
}

// `length` is that of every row, or that of all sequences together where there are `bounds`. gate.py has copied and
// checked the bounds.
template <class Real>
void scan(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bounds, int64_t sequences, int64_t length,
          double gamma, double lam, int masked, uintptr_t advantages, uintptr_t returns, int threads) {
  py::gil_scoped_release release;
  gae<Real>({pointer<const Real>(rewards), pointer<const Real>(values), pointer<const uint8_t>(mask),
             pointer<const int64_t>(bounds), sequences, length, gamma, lam, Masked(masked), pointer<Real>(advantages),
             pointer<Real>(returns)},
            threads);
}

using Matrix = std::array<int64_t, 4>;  // address, row stride, column stride, whether it is fp32

void product(const std::array<int64_t, 3>& sizes, const Matrix& a, const Matrix& b, uintptr_t out, int64_t out_row,
             bool accumulate, int threads) {
  py::gil_scoped_release release;
  const auto operand = [](const Matrix& x) { return Operand{uintptr_t(x[0]), x[1], x[2], x[3] != 0}; };
  gemm({sizes[0], sizes[1], sizes[2], operand(a), operand(b), pointer<float>(out), out_row, accumulate, threads});
}

using Rows = std::array<int64_t, 2>;  // address, row stride

void give_back(const std::array<int64_t, 3>& sizes, const Rows& dlogits, const Rows& weight, const Rows& hidden,
               const Rows& dhidden, const Rows& dweight, int threads) {
  py::gil_scoped_release release;
  const auto wide = [](const Rows& x) { return pointer<float>(uintptr_t(x[0])); };
  const auto narrow = [](const Rows& x) { return reinterpret_cast<const uint16_t*>(x[0]); };
  add_rounding({sizes[0], sizes[1], sizes[2], wide(dlogits), dlogits[1], narrow(weight), weight[1], narrow(hidden),
                hidden[1], wide(dhidden), dhidden[1], wide(dweight), dweight[1], threads});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  if (isa_refused())
    throw py::import_error(
        "RLKERNELS_CPU_ISA must be amx, avx512, avx2 or baseline, and no more than this machine has (" +
        std::string(isa()) + "); got '" + isa_refused() + "'");
  py::class_<Batch>(m, "Batch").def(py::init(&batch));
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer([](Buffer& b) {
    return py::buffer_info(b.data(), 1, py::format_descriptor<uint8_t>::format(), b.size());
  });
  m.def("kept_bytes", &kept_bytes);
  m.def("release", &release);
  m.def("isa", &isa);
  m.def("token_stats", &stats);
  m.def("token_stats_backward", &backward);
  m.def("divergence", &compare);
  m.def("fused_policy", &policy);
  m.def("elementwise_f32", &apply<float>);
  m.def("elementwise_f64", &apply<double>);
  m.def("weighted_loss_f32", &weighted<float>);
  m.def("weighted_loss_f64", &weighted<double>);
  m.def("gae_f32", &scan<float>);
  m.def("gae_f64", &scan<double>);
  m.def("gemm_available", &gemm_available);
  m.def("gemm_name", [] { return gemm_kernels().name; });
  m.def("gemm_f32_available", &gemm_f32_available);
  m.def("gemm_f32_preferred", &gemm_f32_preferred);
  m.def("gemm", &product);
  m.def("add_rounding", &give_back);
  py::dict objectives;  // name -> (columns, params)
#define RLK_ENTRY(name, columns, params) objectives[#name] = py::make_tuple(columns, params);
  RLK_OBJECTIVES(RLK_ENTRY)
  m.attr("OBJECTIVES") = objectives;
  m.attr("INTERFACE") = kInterface;
  tensors::bind(m);
  m.attr("OBJECTIVES_DIGEST") = RLK_OBJECTIVES_DIGEST;
}
