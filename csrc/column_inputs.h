// The inputs of one element of a sum over columns, on both backends: its columns and its weight.
#pragma once
#include "objective_functions.h"

namespace rlk {

// Element i of column C. The first column may be a difference, of which job.minus holds what is taken away.
template <size_t C, class Job>
RLK_HD auto column(const Job& job, long long i) {
  auto x = job.columns[C][i];
  if (C == 0 && job.minus[0]) x -= job.minus[0][i];
  if (C == 0 && job.minus[1]) x -= job.minus[1][i];
  return x;
}

// The weight of element i. A dead element weighs 0 by branch, because the factor is infinite where no element is live.
template <class Job, class S>
RLK_HD S weight_at(const Job& job, S factor, long long i) {
  if (job.mask) return job.mask[i] ? factor : S(0);
  const S own = job.weight ? job.weight[i] : S(1);
  return own == 0 ? S(0) : own * factor;
}

}  // namespace rlk
