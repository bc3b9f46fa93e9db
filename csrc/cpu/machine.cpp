// The instruction set: chosen once, when the module is loaded.
#include <cstdlib>

#include "batch.h"

namespace rlk {
namespace {

enum Isa { kBaseline, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best() {
#if defined(RLK_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kBaseline;
}

const char* wish() {
  const char* name = std::getenv("RLKERNELS_CPU_ISA");
  return name && *name ? name : nullptr;
}

Isa choose() {
  const Isa most = best();
  for (int isa = kBaseline; wish() && isa < most; ++isa)
    if (std::strcmp(wish(), kNames[isa]) == 0) return Isa(isa);
  return most;
}

const Isa kIsa = choose();

}  // namespace

const char* isa() { return kNames[kIsa]; }

const char* isa_refused() { return wish() && std::strcmp(wish(), isa()) != 0 ? wish() : nullptr; }

RowKernels row_kernels(Dtype dtype) {
  if (dtype == Dtype::f64) return row_kernels_f64();
#if defined(RLK_X86)
  if (kIsa == kAvx512) return avx512::row_kernels(dtype);
  if (kIsa == kAvx2) return avx2::row_kernels(dtype);
#endif
  return baseline::row_kernels(dtype);
}

}  // namespace rlk
