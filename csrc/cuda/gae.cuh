// Generalised advantage estimation as one reverse scan per sequence, in one launch and in double. Sequences have any
// length and any mask, padded or packed.
//
// Walked from the end, a live token turns the state (V_next, A_next) into (V, r - V + gamma V_next + gamma lam A_next).
// A dead token leaves the state alone ("skip") or is a step with r = V = 0 ("zero"). Such maps compose. A thread
// composes its own tokens, and warps scan the maps of their threads. The state is carried from warp to warp and from
// chunk to chunk, in the order of the sequence.
#pragma once
#include "platform.cuh"
#include "arguments.h"

namespace rlk {

// The map V' = (keep ? V : 0) + v,  A' = p V + q A + s.
struct Map {
  int keep = 1;
  double v = 0, p = 0, q = 1, s = 0;
};

struct State {
  double value = 0, trace = 0;
};

// The map of a and then b, where a is nearer the end of the sequence.
__device__ __forceinline__ Map then(const Map& a, const Map& b) {
  return {a.keep & b.keep, (b.keep ? a.v : 0.0) + b.v, (a.keep ? b.p : 0.0) + b.q * a.p, b.q * a.q,
          b.p * a.v + b.q * a.s + b.s};
}

__device__ __forceinline__ State apply(const Map& m, const State& x) {
  return {(m.keep ? x.value : 0.0) + m.v, m.p * x.value + m.q * x.trace + m.s};
}

__device__ __forceinline__ Map shuffle_up(const Map& m, int distance) {
  return {__shfl_up_sync(0xffffffffu, m.keep, distance), __shfl_up_sync(0xffffffffu, m.v, distance),
          __shfl_up_sync(0xffffffffu, m.p, distance), __shfl_up_sync(0xffffffffu, m.q, distance),
          __shfl_up_sync(0xffffffffu, m.s, distance)};
}

template <class Real, int BLOCK, int ITEMS>
__global__ void __launch_bounds__(BLOCK) gae(const GaeJob<Real> job) {
  constexpr int kScanWarps = BLOCK / 32;
  // The maps of the warps. Two sets are used in turn, so that one barrier per chunk is enough.
  CUDA_DYN_SHARED(Map, totals);
  const long long sequence = blockIdx.x;
  const long long begin = job.bounds ? job.bounds[sequence] : sequence * job.length;
  const long long end = job.bounds ? job.bounds[sequence + 1] : begin + job.length;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const double decay = job.gamma * job.lam;
  State carry;
  int turn = 0;
  for (long long last = end - 1; last >= begin; last -= BLOCK * ITEMS, turn ^= 1) {
    const long long mine = last - (long long)threadIdx.x * ITEMS;
    double reward[ITEMS], value[ITEMS];
    bool live[ITEMS];
    Map own;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const long long t = mine - i;
      const bool inside = t >= begin;
      live[i] = inside && (!job.mask || job.mask[t]);
      reward[i] = live[i] ? double(job.rewards[t]) : 0.0;  // a dead position is not read, because it may hold anything
      value[i] = live[i] ? double(job.values[t]) : 0.0;
      if (live[i] || (inside && job.masked == Masked::zero))
        own = then(own, {0, value[i], job.gamma, decay, reward[i] - value[i]});
    }
    Map upto = own;  // of this thread and those before it in the warp
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const Map before = shuffle_up(upto, o);
      if (lane >= o) upto = then(before, upto);
    }
    Map before = shuffle_up(upto, 1);
    if (lane == 0) before = Map();
    Map* const set = totals + turn * kScanWarps;
    if (lane == 31) set[warp] = upto;
    __syncthreads();
    State state;
#pragma unroll
    for (int w = 0; w < kScanWarps; ++w) {
      if (w == warp) state = carry;
      carry = apply(set[w], carry);
    }
    state = apply(before, state);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const long long t = mine - i;
      if (t < begin) break;
      if (live[i] || job.masked == Masked::zero) {
        state.trace = reward[i] + job.gamma * state.value - value[i] + decay * state.trace;
        state.value = value[i];
      }
      job.advantages[t] = live[i] ? Real(state.trace) : Real(0);
      job.returns[t] = live[i] ? Real(state.trace + state.value) : Real(0);
    }
  }
}

template <int BLOCK>
constexpr int gae_shared() {
  return 2 * BLOCK / 32 * int(sizeof(Map));
}

}  // namespace rlk
