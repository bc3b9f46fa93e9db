// The arguments that both native backends take. All are numbers (addresses, strides, sizes), because native code knows
// no tensor. Arguments that differ between the backends stand in cpu/arguments.h and cuda/arguments.h.
#pragma once
#include "objective_functions.h"

namespace rlk {

// The statistics of a row under one name each. The kernels of both backends use these names, and so does
// rlkernels/backends/triton/row_statistics.py. Columns outside the support count nowhere. T is the temperature.
//
//   row_max       the largest logit x: all others are measured from it, because exp(x / T) alone would overflow
//   sum_exp       the sum of e = exp(z), with the centred logit z = (x - row_max) / T
//   weighted_sum  the sum of e z             entropy     = log sum_exp - weighted_sum / sum_exp
//   square_sum    the sum of e^2             log_sum_sq  = log square_sum - 2 log sum_exp
//   logit_sum     the sum of x               mean_logits = logit_sum / count / T
//   count         the number of columns
//   first_max     the first column with row_max
//   ref_row_max   row_max of the row of the reference
//   ref_sum_exp   sum_exp of the row of the reference
//   cross_sum     the sum of e (z - ref_z)   kl          = cross_sum / sum_exp - log sum_exp + log ref_sum_exp
//
// The CPU kernels sum T z in the place of z. The CUDA kernels sum z in units of log 2.

// The outputs of token_stats beyond logp, row_max and sum_exp, as flags. Their values are those of
// rlkernels/backends/eager.py.
constexpr unsigned kEntropy = 1, kLogSumSq = 2, kMeanLogits = 4, kIsTop1 = 8, kKl = 16;

template <class T>
RLK_HD T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The place of every row of a tensor [B, L, V] or [T, V]. Row r starts at address + (r / level) * outer + (r % level) *
// inner, in elements. Offsets have 64 bits, because T V passes 2^31 at 14k tokens of a vocabulary of 152k.
struct Layout {
  uintptr_t address = 0;
  int64_t outer = 0, inner = 0, level = 1;
  RLK_HD int64_t offset(int64_t r) const { return (r / level) * outer + (r % level) * inner; }
  // Row r as elements of a type, and as elements of a size.
  template <class T>
  RLK_HD T* row(int64_t r) const {
    return reinterpret_cast<T*>(address) + offset(r);
  }
  RLK_HD char* row(int64_t r, int64_t bytes) const { return reinterpret_cast<char*>(address) + offset(r) * bytes; }
};

// The outputs of token_stats: addresses of one number per row each. An address of 0 is an output that is not wanted.
struct StatsOutputs {
  uintptr_t logp, row_max, sum_exp, entropy, log_sum_sq, mean_logits, is_top1, ref_logp, ref_row_max, ref_sum_exp, kl;
  RLK_HD unsigned wanted() const {
    return (entropy ? kEntropy : 0) | (log_sum_sq ? kLogSumSq : 0) | (mean_logits ? kMeanLogits : 0) |
           (is_top1 ? kIsTop1 : 0) | (kl ? kKl : 0);
  }
};

// The inputs of token_stats_backward: addresses of one number per row each. An address of 0 is an input that is absent.
struct BackwardInputs {
  uintptr_t dlogp, dentropy, dkl, row_max, sum_exp, entropy, ref_row_max, ref_sum_exp, kl;
};

// The statistics of one row as they are stored, rounded to the dtype of the arithmetic. A gradient starts from these
// and from nothing more exact, so that the fused pass and two separate passes agree in every bit.
template <class Real>
struct SavedRow {
  Real row_max, sum_exp, entropy, ref_row_max, ref_sum_exp, kl;
};

// The upstream gradients of the log-probability, the entropy and the KL of one row.
template <class Real>
struct Upstream {
  Real logp, entropy, kl;
};

// The inputs of fused_policy beside its objective: addresses of one number per row each. 0: the term is absent.
struct PolicyInputs {
  uintptr_t weight, entropy_weight, ref_logp, kl_weight;
};

// The outputs of fused_policy: addresses of one number per row each.
struct PolicyOutputs {
  uintptr_t logp, row_max, sum_exp, entropy, dlogp;
};

// The rule for a dead token between live ones. `skip` carries value and trace over it. `zero` makes it a step with
// reward and value 0. `none` ignores the mask.
enum class Masked : int { skip, zero, none };

// Generalised advantage estimation. Sequence s is [bounds[s], bounds[s + 1]), or row s of `length` where bounds is
// null.
template <class Real>
struct GaeJob {
  const Real *rewards, *values;
  const uint8_t* mask;  // null: every token is live
  const int64_t* bounds;
  int64_t sequences, length;
  double gamma, lam;
  Masked masked;
  Real *advantages, *returns;
};

}  // namespace rlk
