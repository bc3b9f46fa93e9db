// The statistics, the objective and the gradient of a row in one launch.
//
// kKeep: the row is copied once into the shared memory of its team, and both sweeps read it there. That is one read and
// one write of device memory. A team is a block, or a cluster of blocks for a row that exceeds one. Without kKeep the
// second sweep reads the row again, backwards, because the first sweep has left its end in the second-level cache.
#pragma once
#include "gradient.cuh"
#include "objective.cuh"
#include "ordered_sum.cuh"
#include "token_stats.cuh"

namespace rlk {

constexpr int kBatch = 4;  // slots whose copies count as one group; two groups are in flight
// Bytes of shared memory before the row: the records, then four doubles and a flag for the sum over rows.
constexpr int kFixedBytes = kRecordBytes + 64;

// The blocks of a multiprocessor for which the compiler is to leave registers. Fewer for fp32, whose batches take twice
// as many and whose rows leave no room for more blocks.
template <class T>
constexpr int blocks_by_registers(int block, bool keep) {
  return keep ? (sizeof(T) == 4 || !kDense ? 512 : 768) / block : 1024 / block;
}

// Bytes that the row's slots take in one block. A slot is eight columns of one lane.
template <class T>
constexpr long long slot_bytes(long long columns, int cluster) {
  return (columns + kStripe - 1) / kStripe * (kLanes / cluster) * (long long)sizeof(Packed<T>);
}

// The part of a row that one thread takes, and with kKeep keeps in shared memory. Slot n holds the eight columns from
// n kStep + Crew::first() on. A batch of whole slots needs no check of its columns: those of a step are inside the row
// for all threads of the team, and its addresses differ by constants.
template <class T, int BLOCK, int CLUSTER>
struct Kept {
  using Crew = Team<BLOCK, CLUSTER>;
  static constexpr int kPerThread = Crew::kPerThread, kWords = Packed<T>::kWords;
  static constexpr int kStep = Crew::kStep;
  static_assert(kBatch % kPerThread == 0, "the slots of a batch go to the same lanes in every batch");
  uint4* words;

  __device__ static long long column(int n) { return (long long)n * kStep + Crew::first(); }
  __device__ static int count(long long columns) { return int((columns + kStep - 1) / kStep); }
  // Slots in whole batches, of a row or its gradient that takes 16-byte accesses or does not.
  __device__ static int whole(long long columns, bool wide) {
    return wide ? int(columns / kStep) / kBatch * kBatch : 0;
  }

  // The words of a slot lie apart, so that neighbours in a warp are neighbours in memory.
  __device__ uint4* word(int n, int k) const { return words + (n * kWords + k) * BLOCK + threadIdx.x; }
  __device__ Packed<T> load(int n) const {
    Packed<T> x;
#pragma unroll
    for (int k = 0; k < kWords; ++k) x.word[k] = *word(n, k);
    return x;
  }
  __device__ void store(int n, const Packed<T>& x) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) *word(n, k) = x.word[k];
  }

  // Starts the copies of the batch from slot n on. It counts as one group of copies even where there is nothing to
  // copy.
  __device__ void fetch(const Row<T>& row, int n, int whole) const {
    const T* const from = row.logits + column(n);
    if (n < whole) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) copy(n + i, from + i * kStep);
    } else if (n == whole && row.wide) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (column(n + i) + kGroup <= row.columns) copy(n + i, from + i * kStep);
    }
    __pipeline_commit();
  }

  __device__ void sweep(Sums (&s)[kPerThread], const Row<T>& row) const {
    const int batches = whole(row.columns, row.wide);
    fetch(row, 0, batches);
    fetch(row, kBatch, batches);
    if (CLUSTER > 1) Crew::sync();  // here, because the copies travel meanwhile
    int n = 0;
#pragma unroll 1
    for (; n < batches; n += kBatch) {
      __pipeline_wait_prior(1);  // no barrier, because a thread reads only what it has copied itself
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const Packed<T> x = load(n + i);
        add_packed<T, kSumsWeighted>(s[i % kPerThread], x, x, column(n + i), row);
      }
      fetch(row, n + 2 * kBatch, batches);
    }
    __pipeline_wait_prior(0);
    const int end = count(row.columns);
#pragma unroll 1
    for (; n < end; n += kBatch) {  // once, or for all of a row that takes no 16-byte loads
      Packed<T> x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (column(n + i) < row.columns)
          x[i] = row.wide && column(n + i) + kGroup <= row.columns
                     ? load(n + i)
                     : load_group<true>(row.logits, column(n + i), row.columns, false);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (column(n + i) < row.columns) {
          store(n + i, x[i]);
          add_packed<T, kSumsWeighted>(s[i % kPerThread], x[i], x[i], column(n + i), row);
        }
    }
  }

  // Stores the gradient of the row, from its end on, because there the caches hold what is read twice.
  template <class Out, bool kKeep>
  __device__ void gradient(const Slope& slope, const Row<T>& row, Out* to) const {
    const bool wide_out = aligned(to);
    constexpr int kTogether = sizeof(T) == 4 ? 2 : kBatch;  // slots whose loads are issued before the first store
    const int batches = whole(row.columns, wide_out && (kKeep || row.wide));
    int n = count(row.columns) - 1;
#pragma unroll 1
    for (; n >= batches; --n) {
      if (column(n) >= row.columns) continue;
      const Packed<T> x = kKeep ? load(n) : load_group<true>(row.logits, column(n), row.columns, row.wide);
      store_group(to, column(n), row.columns, wide_out,
                  gradient_packed<T, Out, false>(slope, x, x, row.mask, column(n), row.columns));
    }
#pragma unroll 1
    for (n = batches - kTogether; n >= 0; n -= kTogether) {
      Out* const at = to + column(n);
      Packed<T> x[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        x[i] = kKeep ? load(n + i) : load_whole<true>(row.logits + column(n) + i * kStep);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        store_whole(at + i * kStep,
                    gradient_packed<T, Out, false>(slope, x[i], x[i], row.mask, column(n + i), column(n + i) + kGroup));
    }
  }

  // Whether this thread has stored the gradient of column y.
  __device__ static bool owns(long long y) { return int(y / kGroup % (BLOCK * CLUSTER)) * kGroup == Crew::first(); }

 private:
  __device__ void copy(int n, const T* from) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      __pipeline_memcpy_async(word(n, k), reinterpret_cast<const char*>(from) + 16 * k, 16);
  }
};

// `Out` is the type of the gradient. The gradient of fp32 logits of a fused head is rounded here to what the head's
// matmuls take, so that it is written once.
template <class T, class Out, int BLOCK, int CLUSTER, bool kKeep>
__global__ void __launch_bounds__(BLOCK, blocks_by_registers<T>(BLOCK, kKeep))
    fused_policy(const Rows rows, const PolicyArguments in, const PolicyOutputs out, const LossSum total,
                 const Layout gradient) {
  using Crew = Team<BLOCK, CLUSTER>;
  CUDA_DYN_SHARED(float, records);
  double* const adders = reinterpret_cast<double*>(records + kFields * kWarps);
  unsigned* const flag = reinterpret_cast<unsigned*>(adders + 4);
  const Kept<T, BLOCK, CLUSTER> kept{reinterpret_cast<uint4*>(reinterpret_cast<char*>(records) + kFixedBytes)};
  const long long r = blockIdx.x / CLUSTER, y = rows.target(r);
  const bool leads = Crew::rank() == 0 && threadIdx.x == 0;
  const float weight = get(in.per_row.weight, r), entropy_weight = get(in.per_row.entropy_weight, r),
              kl_weight = in.kl < 0 ? 0.0f : get(in.per_row.kl_weight, r);
  Out* const to = gradient.address ? gradient.row<Out>(r) : nullptr;
  const long long columns = rows.columns;
  SavedRow<float> state{};
  float logp = 0, dlogp = 0;
  double loss = 0;
  const bool live = y != rows.ignore_index && (weight != 0 || entropy_weight != 0 || kl_weight != 0);
  if (live) {
    const float inverse_temperature = rows.inverse_temperature_of(r);
    const Row<T> row = row_of<T>(rows, r, inverse_temperature);
    // Read before the barrier of `reduce`, because a store may overwrite it afterwards.
    const float logit = logit_of(rows, row.logits, row.mask, y);
    Sums lanes[Crew::kPerThread];
    if (kKeep) {
      kept.sweep(lanes, row);
    } else {
      sweep<T, kSumsWeighted, false, Crew>(lanes, row);
    }
    Sums s = Crew::template reduce<kSumsWeighted>(lanes, records, row.scale);
    if (!rows.holds(y)) s.row_max = s.sum_exp = NAN;
    state.row_max = s.row_max, state.sum_exp = s.sum_exp, state.entropy = entropy_from(s);
    logp = logp_from(logit, s.row_max, s.sum_exp, inverse_temperature);
    // Every thread evaluates the objective, because that is cheaper than telling the others. Terms of weight 0 are left
    // out by branch, because 0 * NaN is NaN.
    if (weight != 0) {
      float column[kWidest] = {logp}, param[kWidest];
#pragma unroll
      for (int k = 1; k < kWidest; ++k) column[k] = get(in.columns[k - 1], r);
#pragma unroll
      for (int k = 0; k < kWidest; ++k) param[k] = in.params[k];
      const Term<float> term = evaluate_objective(in.objective, column, param);
      dlogp = weight * term.derivative;
      loss = double(weight) * double(term.value);
    }
    if (kl_weight != 0) {
      const float column[kWidest] = {logp, get(in.per_row.ref_logp, r)}, none[kWidest] = {};
      const Term<float> term = evaluate_objective(in.kl, column, none);
      dlogp += kl_weight * term.derivative;
      loss += double(kl_weight) * double(term.value);
    }
    if (entropy_weight != 0) loss -= double(entropy_weight) * double(state.entropy);
    Upstream<float> up{dlogp, -entropy_weight, 0};
    if (row.mask && rows.holds(y) && !row.mask[y]) up.logp = 0;
    if (to && (up.logp != 0 || up.entropy != 0)) {
      const Slope slope = slope_of(state, up, inverse_temperature);
      kept.template gradient<Out, kKeep>(slope, row, to);
      if (rows.holds(y) && kept.owns(y)) store_target<Out, false>(slope, logit, 0.0f, row.mask, to, y);
    } else if (to) {
      fill_zero(to, 0, columns, columns, Crew::rank() * BLOCK + int(threadIdx.x), BLOCK * CLUSTER);
    }
  } else if (to) {  // not read, but written
    fill_zero(to, 0, columns, columns, Crew::rank() * BLOCK + int(threadIdx.x), BLOCK * CLUSTER);
  }
  if (leads) {
    put(out.logp, r, logp), put(out.row_max, r, state.row_max), put(out.sum_exp, r, state.sum_exp),
        put(out.entropy, r, state.entropy);
    put(out.dlogp, r, dlogp);
    pointer<double>(total.losses)[r] = loss;
  }
  if (Crew::rank() == 0 && comes_last(reinterpret_cast<unsigned*>(total.ticket), unsigned(rows.rows), flag)) {
    const double sum = add_parts(pointer<const double>(total.losses), rows.rows, adders);
    if (threadIdx.x == 0) *pointer<float>(total.loss) = float(sum);
  }
}

}  // namespace rlk
