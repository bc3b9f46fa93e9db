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

constexpr int kFlight = 8;  // copies in flight per thread
// Bytes of shared memory before the row: the records, then four doubles and a flag for the sum over rows.
constexpr int kFixedBytes = kRecordBytes + 64;

// Bytes that the row's slots take in one block. A slot is eight columns of one lane.
template <class T>
constexpr long long slot_bytes(long long columns, int cluster) {
  return (columns + kStripe - 1) / kStripe * (kLanes / cluster) * (long long)sizeof(Packed<T>);
}

// The part of a row that one thread keeps in shared memory.
template <class T, int BLOCK, int CLUSTER>
struct Kept {
  using Crew = Team<BLOCK, CLUSTER>;
  static constexpr int kPerThread = Crew::kPerThread;
  Packed<T>* slots;

  // Slot n of this thread. Neighbours in a warp are neighbours in memory.
  __device__ Packed<T>* slot(long long n) const { return slots + n * BLOCK + threadIdx.x; }
  __device__ static long long column(long long n) {
    return n / kPerThread * kStripe + (long long)Crew::lane(int(n % kPerThread)) * kGroup;
  }

  // Starts the copy of slot n. It counts as one group of copies even where there is nothing to copy.
  __device__ void fetch(const Row<T>& row, long long n) const {
    const long long at = column(n);
    if (row.wide && at + kGroup <= row.columns) {
      const char* from = reinterpret_cast<const char*>(row.logits + at);
      char* to = reinterpret_cast<char*>(slot(n));
#pragma unroll
      for (int k = 0; k < Packed<T>::kWords; ++k) __pipeline_memcpy_async(to + 16 * k, from + 16 * k, 16);
    } else if (at < row.columns) {
      *slot(n) = load_group<true>(row.logits, at, row.columns, false);
    }
    __pipeline_commit();
  }

  __device__ static long long count(const Row<T>& row) { return (row.columns + kStripe - 1) / kStripe * kPerThread; }

  __device__ void sweep(Sums (&s)[kPerThread], const Row<T>& row) const {
    const long long n = count(row);
#pragma unroll
    for (int k = 0; k < kFlight; ++k) fetch(row, k);
    if (CLUSTER > 1) Crew::sync();  // here, because the copies travel meanwhile
    for (long long first = 0; first < n; first += kPerThread) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        __pipeline_wait_prior(kFlight - 1);  // no barrier, because a thread reads only what it has copied itself
        if (column(first + k) < row.columns) {
          const Packed<T> x = *slot(first + k);
          add_packed<T, kSumsWeighted>(s[k], x, x, column(first + k), row);
        }
        fetch(row, first + k + kFlight);
      }
    }
  }
};

// `Out` is the type of the gradient. The gradient of fp32 logits of a fused head is rounded here to what the head's
// matmuls take, so that it is written once.
template <class T, class Out, int BLOCK, int CLUSTER, bool kKeep>
__global__ void __launch_bounds__(BLOCK, kKeep ? 1 : 1024 / BLOCK)
    fused_policy(const Rows rows, const PolicyArguments in, const PolicyOutputs out, const LossSum total,
                 const Layout gradient) {
  using Crew = Team<BLOCK, CLUSTER>;
  CUDA_DYN_SHARED(float, records);
  double* const adders = reinterpret_cast<double*>(records + kFields * kWarps);
  unsigned* const flag = reinterpret_cast<unsigned*>(adders + 4);
  const Kept<T, BLOCK, CLUSTER> kept{reinterpret_cast<Packed<T>*>(reinterpret_cast<char*>(records) + kFixedBytes)};
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
      const bool wide_out = aligned(to);
      for (long long n = Kept<T, BLOCK, CLUSTER>::count(row) - 1; n >= 0; --n) {
        const long long column = Kept<T, BLOCK, CLUSTER>::column(n);
        if (column >= columns) continue;
        const Packed<T> x = kKeep ? *kept.slot(n) : load_group<true>(row.logits, column, columns, row.wide);
        store_group(to, column, columns, wide_out,
                    gradient_packed<T, Out, false>(slope, x, x, row.mask, column, columns));
      }
      if (rows.holds(y) && y / kGroup % (CLUSTER * BLOCK) == Crew::rank() * BLOCK + int(threadIdx.x))
        store_target<Out, false>(slope, logit, 0.0f, row.mask, to, y);
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
