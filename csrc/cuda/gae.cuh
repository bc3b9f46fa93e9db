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

// The tokens of a warp in shared memory, in the order of the scan. A gap after the tokens of each thread lets both the
// threads that take neighbouring tokens and those that take their own ones meet different banks.
template <class Real, int ITEMS>
struct WarpTokens {
  static constexpr int kTokens = 32 * ITEMS, kPlaces = kTokens + 32;
  Real* at;
  __device__ Real& operator[](int token) const { return at[token + token / ITEMS]; }
};

template <class Real, int BLOCK, int ITEMS>
__global__ void __launch_bounds__(BLOCK) gae(const GaeJob<Real> job) {
  constexpr int kScanWarps = BLOCK / 32;
  using Tokens = WarpTokens<Real, ITEMS>;
  static_assert(ITEMS == 8, "a byte of each thread's tokens lies in one word of a ballot");
  // The maps of the warps. Two sets are used in turn, so that one barrier per chunk is enough.
  CUDA_DYN_SHARED(Map, totals);
  const long long sequence = blockIdx.x;
  const long long begin = job.bounds ? job.bounds[sequence] : sequence * job.length;
  const long long end = job.bounds ? job.bounds[sequence + 1] : begin + job.length;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  Real* const mine_of_all = reinterpret_cast<Real*>(totals + 2 * kScanWarps) + warp * 2 * Tokens::kPlaces;
  const Tokens first{mine_of_all}, second{mine_of_all + Tokens::kPlaces};  // rewards and values, then the results
  const double decay = job.gamma * job.lam;
  State carry;
  int turn = 0;
  for (long long last = end - 1; last >= begin; last -= BLOCK * ITEMS, turn ^= 1) {
    // Neighbouring threads take neighbouring tokens from memory and to it, because a warp whose threads take eight each
    // would touch eight times as many sectors.
    const long long warp_last = last - (long long)warp * Tokens::kTokens;
    // The masks of all tokens, then their rewards and values, then the places of these. In one loop each token's loads
    // would wait for its mask, and the next token's mask for the ballot before it.
    const long long at = warp_last - lane;  // the i-th token that this thread moves is at - 32 i
    const int left = at < begin ? -1 : int(at - begin < Tokens::kTokens ? at - begin : Tokens::kTokens);
    bool here[ITEMS];
    Real rewards[ITEMS], values[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) here[i] = i * 32 <= left && (!job.mask || job.mask[at - i * 32]);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      // A dead position is not read, because it may hold anything.
      rewards[i] = here[i] ? job.rewards[at - i * 32] : Real(0);
      values[i] = here[i] ? job.values[at - i * 32] : Real(0);
    }
    unsigned live = 0;  // bit i: the i-th token of this thread
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      first[i * 32 + lane] = rewards[i];
      second[i * 32 + lane] = values[i];
      const unsigned word = __ballot_sync(0xffffffffu, here[i]);
      if (lane / 4 == i) live = word >> lane % 4 * ITEMS & 0xffu;
    }
    __syncwarp();
    const long long mine = warp_last - (long long)lane * ITEMS;
    Map own;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const double reward = double(first[lane * ITEMS + i]), value = double(second[lane * ITEMS + i]);
      if (live >> i & 1 || (mine - i >= begin && job.masked == Masked::zero))
        own = then(own, {0, value, job.gamma, decay, reward - value});
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
      Real& reward = first[lane * ITEMS + i];
      Real& value = second[lane * ITEMS + i];
      const bool here = live >> i & 1;
      if (here || job.masked == Masked::zero) {
        state.trace = double(reward) + job.gamma * state.value - double(value) + decay * state.trace;
        state.value = double(value);
      }
      reward = here ? Real(state.trace) : Real(0);
      value = here ? Real(state.trace + state.value) : Real(0);
    }
    __syncwarp();
    // No barrier behind this, because the next chunk's tokens take the places of results that the same thread has read.
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (i * 32 > left) break;
      job.advantages[at - i * 32] = first[i * 32 + lane];
      job.returns[at - i * 32] = second[i * 32 + lane];
    }
  }
}

template <class Real, int BLOCK, int ITEMS>
constexpr int gae_shared() {
  return 2 * BLOCK / 32 * int(sizeof(Map)) + BLOCK / 32 * 2 * WarpTokens<Real, ITEMS>::kPlaces * int(sizeof(Real));
}

}  // namespace rlk
