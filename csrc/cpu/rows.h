// The kernels of one row. Function pointers, because the instruction set is chosen when the module is loaded.
#pragma once
#include <cstdint>

#include "../arguments.h"
#include "../dispatch.h"

namespace rlk {

constexpr double kLog2E = 1.4426950408889634;

// The arguments of the sums of one row. `wanted` holds flags of outputs: weighted_sum is formed for kEntropy,
// square_sum for kLogSumSq, and cross_sum for kKl.
struct SumsJob {
  const void* row;
  const void* ref;      // kKl: the reference row
  const uint8_t* mask;  // null, or one byte per column: zero takes the column out of the support
  int64_t columns;
  double temperature;
  double ref_row_max;
  unsigned wanted;
};

// The sums of one row, named in ../arguments.h, with T z = x - row_max in the place of z. row_max and sum_exp are NaN
// where the support holds a NaN, +inf or no finite logit.
struct RowSums {
  double row_max, sum_exp;
  double weighted_sum;  // the sum of e (x - row_max)
  double square_sum;    // the sum of e^2
  double cross_sum;     // the sum of e ((x - row_max) - (r - ref_row_max))
};

// out = e (flat + slope (x - row_max) + cross ((x - row_max) - (r - ref_row_max))), with e = exp((x - row_max) / T).
struct GradientJob {
  const void* row;
  const void* ref;
  const uint8_t* mask;
  void* out;  // may be row
  int64_t columns;
  double temperature, row_max, ref_row_max;
  double flat, slope, cross;
  bool stream;  // store around the cache, because out is large and not read again soon
};

// A row of a student and that of its teacher, with the sums of both. With p and q their probabilities and the mixture
// M = (1 - beta) p + beta q, the gradient is out = scale p (log p - log M - own), or out = scale (p - q) where beta is
// 0.
struct PairJob {
  const void* row;
  const void* ref;
  const uint8_t* mask;
  void* out;  // may be row
  int64_t columns;
  double temperature, row_max, sum_exp, ref_row_max, ref_sum_exp;
  double beta, scale, own;
  bool stream;
};

struct RowKernels {
  void (*sums)(const SumsJob&, RowSums&);
  void (*gradient)(const GradientJob&);
  void (*mixture_sums)(const PairJob&, double* own, double* others);  // KL(p || M) and KL(q || M)
  void (*pair_gradient)(const PairJob&);
};

// rows.cpp is compiled once per instruction set. rows_f64.cpp alone serves Dtype::f64.
namespace baseline {
RowKernels row_kernels(Dtype);
}
namespace avx2 {
RowKernels row_kernels(Dtype);
}
namespace avx512 {
RowKernels row_kernels(Dtype);
}
RowKernels row_kernels_f64();

RowKernels row_kernels(Dtype);  // of the chosen instruction set
const char* isa();              // its name
const char* isa_refused();      // what RLKERNELS_CPU_ISA asked for and this machine has not, or null

}  // namespace rlk
