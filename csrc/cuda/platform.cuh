// CUDA's own headers under nvcc. Elsewhere the header that runs the same source on the CPU is included, which is
// tests/backends/cuda_backend/tools/cuda_host.h. Kernels use no <<<>>> and no static __shared__, because both must read
// them unchanged.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#define CUDA_DYN_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char cuda_dyn_shared_[]; \
  T* const name = reinterpret_cast<T*>(cuda_dyn_shared_)
#else
#include "cuda_host.h"
#endif

#include "../dispatch.h"

namespace rlk {

// Whether the target's code is held to the registers with which most blocks fit. For sm_80 and sm_120 the compiler
// would spill.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr bool kDense = true;
#else
constexpr bool kDense = false;
#endif

// 2^x. The only instruction of these kernels that the run on the CPU does not execute. ftz makes 0 of what is below
// 2^-126 of the row's largest term.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as changes the type, not the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace rlk
