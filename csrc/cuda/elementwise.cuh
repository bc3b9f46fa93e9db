// An objective over columns of numbers in one launch: its values, its derivatives and their weighted sum. The functor
// is a template argument, so that it is inlined.
#pragma once
#include "../column_inputs.h"
#include "ordered_sum.cuh"
#include "arguments.h"

namespace rlk {

// Elements per block. Fixed, so that the order of the sum depends on the number of elements alone.
constexpr int kPart = 1024;

template <class F, class S, size_t... C, size_t... P>
__device__ __forceinline__ Term<S> evaluate_at(const ElementwiseJob<S>& job, long long i, std::index_sequence<C...>,
                                               std::index_sequence<P...>) {
  return F{}(column<C>(job, i)..., job.params[P]...);
}

// Asks for two blocks per multiprocessor in fp64, because ptxas else stops at 64 registers, and sapo and discopop
// spill.
template <class F, int C, int P, class S, int BLOCK>
__global__ void __launch_bounds__(BLOCK, sizeof(S) == 8 ? 2 : 4) elementwise(const ElementwiseJob<S> job) {
  CUDA_DYN_SHARED(double, warps);  // one per warp, four for add_parts, and the flag
  const int t = int(threadIdx.x);
  const S factor = job.total ? S(1.0 / double(*job.total)) * job.share : job.share;
  double sum = 0;
#pragma unroll
  for (int k = 0; k < kPart / BLOCK; ++k) {
    const long long i = (long long)blockIdx.x * kPart + k * BLOCK + t;
    if (i >= job.n) break;
    const S weight = weight_at(job, factor, i);
    Term<S> term{S(0), S(0)};
    if (weight != 0) {  // an element of weight 0 is not evaluated, because its columns may hold anything
      term = evaluate_at<F>(job, i, std::make_index_sequence<C>{}, std::make_index_sequence<P>{});
      sum += double(weight) * double(term.value);
    }
    const S slope = job.of_loss ? weight * term.derivative : term.derivative;
    if (job.value) job.value[i] = term.value;
    job.derivative[i] = slope;
    if (job.opposite) job.opposite[i] = -slope;
  }
  sum = warp_sum(sum);
  if (t % 32 == 0) warps[t / 32] = sum;
  __syncthreads();
  if (t == 0) {
    double part = 0;
#pragma unroll
    for (int w = 0; w < BLOCK / 32; ++w) part += warps[w];
    if (job.ticket) {
      job.parts[blockIdx.x] = part;
    } else {
      *job.loss = S(part);
    }
  }
  if (!job.ticket) return;
  double* const adders = warps + BLOCK / 32;
  if (!comes_last(job.ticket, gridDim.x, reinterpret_cast<unsigned*>(adders + 4))) return;
  const double all = add_parts(job.parts, gridDim.x, adders);
  if (t == 0) *job.loss = S(all);
}

template <int BLOCK>
constexpr int elementwise_shared() {
  return (BLOCK / 32 + 5) * int(sizeof(double));
}

}  // namespace rlk
