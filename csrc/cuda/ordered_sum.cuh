// A sum over the whole launch without float atomics. Every block leaves its part, and the last block to finish adds the
// parts in their order.
#pragma once
#include "platform.cuh"

namespace rlk {

// Threads that add the parts, whatever the block size, so that the order depends on the number of parts alone.
constexpr int kAdders = 128;

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// Whether this block comes last. Thread 0 has stored the block's part before. `flag` lies in shared memory.
__device__ __forceinline__ bool comes_last(unsigned* ticket, unsigned blocks, unsigned* flag) {
  if (threadIdx.x == 0) {
    __threadfence();  // so that the part is visible before the ticket says so
    *flag = atomicAdd(ticket, 1u) == blocks - 1;
    __threadfence();  // so that the parts of the others are read after it
  }
  __syncthreads();
  return *flag != 0;
}

// The sum of the parts, in thread 0 of the block: parts k, k + 128, k + 256 ... one after another, then the 128 sums.
// `warps` holds four doubles.
__device__ inline double add_parts(const double* parts, long long n, double* warps) {
  const int t = int(threadIdx.x);
  if (t < kAdders) {
    constexpr int kMore = 8;  // loads in flight, because a part comes from the second-level cache
    double sum = 0;
    for (long long k = t; k < n; k += kMore * kAdders) {
      double part[kMore];
#pragma unroll
      for (int i = 0; i < kMore; ++i) part[i] = k + i * kAdders < n ? __ldcg(parts + k + i * kAdders) : 0.0;
#pragma unroll
      for (int i = 0; i < kMore; ++i) sum += part[i];
    }
    sum = warp_sum(sum);
    if (t % 32 == 0) warps[t / 32] = sum;
  }
  __syncthreads();
  return ((warps[0] + warps[1]) + (warps[2] + warps[3]));
}

}  // namespace rlk
