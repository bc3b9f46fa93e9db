// What Python hands over: addresses, strides and sizes, as numbers. No CUDA type here, so that the bindings need none.
#pragma once
#include <cstdint>

#include "../dispatch.h"

namespace rlk {

// Row r of [B, L, V] starts at address + (r / level) * outer + (r % level) * inner, in elements; 64-bit throughout.
struct Layout {
  uintptr_t address = 0;
  long long outer = 0, inner = 0, level = 1;
  template <class T>
  RLK_HD T* row(long long r) const {
    return reinterpret_cast<T*>(address) + ((r / level) * outer + (r % level) * inner);
  }
};

struct Rows {
  Dtype dtype = Dtype::f32;
  long long rows = 0, columns = 0;
  Layout logits, ref;  // ref.address 0: no reference
  uintptr_t targets = 0;
  long long target_stride = 1;
  int target_bytes = 8;
  long long ignore_index = -100;
  float inverse_temperature = 1;
  uintptr_t temperatures = 0;  // per row, fp32; 0: the number above
  uintptr_t mask = 0;          // 0: every column is in the support
  long long mask_stride = 0;

  RLK_HD long long target(long long r) const {
    const char* at = reinterpret_cast<const char*>(targets) + r * target_stride * target_bytes;
    return target_bytes == 8 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
  }
  RLK_HD bool holds(long long column) const { return column >= 0 && column < columns; }
  RLK_HD const unsigned char* mask_row(long long r) const {
    return mask ? reinterpret_cast<const unsigned char*>(mask) + r * mask_stride : nullptr;
  }
  RLK_HD float inverse_temperature_of(long long r) const {
    return temperatures ? 1.0f / reinterpret_cast<const float*>(temperatures)[r] : inverse_temperature;
  }
};

template <class Real>
RLK_HD Real* reals(uintptr_t address) {
  return reinterpret_cast<Real*>(address);
}

// Addresses of one number per row each; 0: not wanted, or not given.
struct StatsOutputs {
  uintptr_t logp, shift, sum_exp, entropy, log_sum_sq, mean_logits, is_top1, ref_logp, ref_shift, ref_sum_exp, kl;
};

struct BackwardInputs {
  uintptr_t dlogp, dentropy, dkl, shift, sum_exp, entropy, ref_shift, ref_sum_exp, kl;
  uintptr_t unless;  // one number: where it is exactly 1, nothing is written; 0: no such number
};

struct PolicyInputs {
  int objective, kl;  // places in RLK_OBJECTIVES; kl -1: none
  uintptr_t columns[kMaxColumns];
  float params[kMaxColumns];
  uintptr_t weight, entropy_weight, ref_logp, kl_weight;
};

struct PolicyOutputs {
  uintptr_t logp, shift, sum_exp, entropy, dlogp;
  uintptr_t losses, ticket;  // one double per row, and the count of rows that are done
  uintptr_t loss;
};

template <class S>
struct ElementwiseJob {
  const S* columns[kMaxColumns];
  S params[kMaxColumns];
  const S* weight;
  S *value, *derivative, *loss;  // value: null where nobody asked
  double* parts;                 // one per block
  unsigned* ticket;              // null where one block does it all
  long long n;
  // Of a weighted loss: what is taken from the first column; a weight 0 or 1 instead of `weight`; every weight is multiplied by share and
  // divided by total, a count. The derivative is then that of the loss; `opposite` gets its negative.
  const S* minus[2];
  const unsigned char* mask;
  const int64_t* total;
  S share = 1;
  S* opposite;
  bool of_loss;
};

enum class Masked : int { skip, zero, none };

// Sequence s is [bounds[s], bounds[s + 1]), or row s of equal length where bounds is null.
template <class Real>
struct GaeJob {
  const Real *rewards, *values;
  const unsigned char* mask;
  const int64_t* bounds;
  long long sequences, length;
  double gamma, lam;
  Masked masked;
  Real *advantages, *returns;
};

}  // namespace rlk
