// One element of a sum over columns, on both backends: what `job` reads for the first column, and what the element weighs.
#pragma once
#include "objective_functions.h"

namespace rlk {

// The first column is the difference of several.
template <size_t C, class Job>
RLK_HD auto column(const Job& job, long long i) {
  auto x = job.columns[C][i];
  if (C == 0 && job.minus[0]) x -= job.minus[0][i];
  if (C == 0 && job.minus[1]) x -= job.minus[1][i];
  return x;
}

// 0 of a dead element, whatever the factor: with no live element it is infinite.
template <class Job, class S>
RLK_HD S weight_at(const Job& job, S factor, long long i) {
  if (job.mask) return job.mask[i] ? factor : S(0);
  const S own = job.weight ? job.weight[i] : S(1);
  return own == 0 ? S(0) : own * factor;
}

}  // namespace rlk
