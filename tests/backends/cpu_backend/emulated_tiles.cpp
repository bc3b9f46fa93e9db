// The matmul of csrc/cpu/gemm.cpp over gemm_amx.cpp and the emulated tile instructions, for test_cpu_tiles.py.
#include "cpu/gemm.h"

rlk::GemmKernels rlk::gemm_kernels() { return amx::gemm_kernels(); }
rlk::GemmKernels rlk::gemm_f32_kernels() { return {}; }

// m, n, k, accumulate, threads; address, row stride, column stride and width of a and of b; address and row of out.
extern "C" void emulated_product(const int64_t* x) {
  const auto operand = [](const int64_t* from) {
    return rlk::Operand{uintptr_t(from[0]), from[1], from[2], from[3] != 0};
  };
  rlk::gemm(
      {x[0], x[1], x[2], operand(x + 5), operand(x + 9), reinterpret_cast<float*>(x[13]), x[14], x[3] != 0, int(x[4])});
}
