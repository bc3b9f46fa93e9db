// What Python hands over: addresses, strides and sizes, as numbers. No CUDA type here, so that the bindings need none.
#pragma once
#include "../arguments.h"
#include "../dispatch.h"

namespace rlk {

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

// The objective and the estimator of its penalty by their places in RLK_OBJECTIVES. `columns` are those behind the log-probability.
struct PolicyArguments {
  int objective, kl;  // kl -1: no penalty
  uintptr_t columns[kMaxColumns];
  float params[kMaxColumns];
  PolicyInputs per_row;
};

// The addresses that a sum over rows takes: one double per row, the count of rows that are done, and the sum.
struct LossSum {
  uintptr_t losses, ticket, loss;
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

}  // namespace rlk
