// The kernels of one row for every dtype but float64, compiled once per instruction set into the namespace RLK_ISA.
#include "two_models.h"

namespace rlk {
namespace RLK_ISA {

RowKernels row_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return {sums<Bf16>, gradient<Bf16>, mixture_sums<Bf16>, pair_gradient<Bf16>};
    case Dtype::f16: return {sums<F16>, gradient<F16>, mixture_sums<F16>, pair_gradient<F16>};
    default: return {sums<float>, gradient<float>, mixture_sums<float>, pair_gradient<float>};
  }
}

}  // namespace RLK_ISA
}  // namespace rlk
