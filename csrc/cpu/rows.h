// What is done to one row of logits, behind function pointers: the instruction set is chosen when the module is loaded.
#pragma once
#include <cstdint>

#include "../dispatch.h"

namespace rlk {

constexpr double kLog2E = 1.4426950408889634;

// Sums over one row beyond the sum of exponentials, as flags.
constexpr unsigned kWeighted = 1, kSquares = 2, kCross = 16;

struct SumsJob {
  const void* row;
  const void* ref;      // kCross: the reference row
  const uint8_t* mask;  // null, or one byte per column: zero takes the column out of the support
  int64_t columns;
  double temperature;
  double ref_shift;
  unsigned wanted;
};

// With e = exp((x - shift) / T), shift the largest x of the support; both NaN when there is none, or a NaN, or +inf.
struct RowSums {
  double shift, sum;
  double weighted;  // sum of e (x - shift)
  double squares;   // sum of e^2
  double cross;     // sum of e ((x - shift) - (r - ref_shift))
};

// out = e (flat + slope (x - shift) + cross ((x - shift) - (r - ref_shift))), with e as above.
struct GradientJob {
  const void* row;
  const void* ref;
  const uint8_t* mask;
  void* out;  // may be row
  int64_t columns;
  double temperature, shift, ref_shift;
  double flat, slope, cross;
  bool stream;  // out is large and not read again soon: store around the cache
};

struct RowKernels {
  void (*sums)(const SumsJob&, RowSums&);
  void (*gradient)(const GradientJob&);
};

// rows.cpp, compiled once per instruction set; Dtype::f64 is served by rows_f64.cpp alone.
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
