// The threads of one row, and the reduction over them.
//
// A row is always added up by 1024 lanes. Lane l takes the groups l, l + 1024, l + 2048 ... of eight columns, one after
// another. Then 32 neighbouring lanes are folded, and then the 32 results. A thread serves one lane or several, and the
// threads are those of one block or of a cluster of blocks. Every kernel, block size and cluster size gives a row the
// same bits, because none of them changes the lanes. A ratio of log-probabilities from two of them is exactly 1.
#pragma once
#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

#include "sums.cuh"

namespace rlk {

constexpr int kLanes = 1024, kWarps = kLanes / 32;
constexpr long long kStripe = (long long)kLanes * kGroup;  // columns that all lanes take in one step
constexpr int kRecordBytes = kFields * kWarps * int(sizeof(float));

// Clusters exist from sm_90 on. The code of older targets never meets a CLUSTER above 1.
#if defined(CUDA_HOST) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define RLK_CLUSTERS 1
#endif

// The threads of one row: CLUSTER blocks of BLOCK threads.
template <int BLOCK, int CLUSTER>
struct Team {
  static_assert(BLOCK % 32 == 0 && kLanes % (BLOCK * CLUSTER) == 0, "lanes are shared out evenly, by whole warps");
  static constexpr int kPerThread = kLanes / (BLOCK * CLUSTER);
  static constexpr int kStep = BLOCK * CLUSTER * kGroup;  // columns that the threads take at once

  __device__ static int rank() {
#ifdef RLK_CLUSTERS
    if (CLUSTER > 1) return int(cooperative_groups::this_cluster().block_rank());
#endif
    return 0;
  }

  // The number of this thread's k-th lane.
  __device__ static int lane(int k) { return (k * CLUSTER + rank()) * BLOCK + int(threadIdx.x); }

  // The columns of a thread's n-th group begin at n kStep + first(). The group belongs to its lane n % kPerThread.
  __device__ static int first() { return (rank() * BLOCK + int(threadIdx.x)) * kGroup; }

  // A barrier for all threads of the row. After the first one the shared memory of every block may be written, because
  // every block has started.
  __device__ static void sync() {
#ifdef RLK_CLUSTERS
    if (CLUSTER > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }

  // The sums of the row, in every thread. This is also the barrier between the last read of the row and the first store
  // over it. Records are pushed to all blocks and not fetched, so that a block may leave when it is done.
  template <unsigned kSums>
  __device__ static Sums reduce(Sums (&s)[kPerThread], float* records, float scale) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) fold_warp<kSums>(s[k], scale);
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int to = 0; to < CLUSTER; ++to) {
        float* const there = at_rank(records, to);
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) write_record<kSums>(there + lane(k) / 32, s[k], kWarps);
      }
    }
    sync();
    Sums all = read_record<kSums>(records + threadIdx.x % 32, kWarps);
    fold_warp<kSums>(all, scale);
    finish<kSums>(all);
    return all;
  }

 private:
  __device__ static float* at_rank(float* mine, int rank) {
#ifdef RLK_CLUSTERS
    if (CLUSTER > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#endif
    return mine;
  }
};

}  // namespace rlk
