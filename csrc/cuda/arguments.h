// The arguments of the CUDA kernels that the CPU has otherwise. No CUDA type is here, because the bindings know none.
#pragma once
#include "../arguments.h"
#include "../dispatch.h"

namespace rlk {

// The rows of one call.
struct Rows {
  Dtype dtype = Dtype::f32;
  long long rows = 0, columns = 0;
  Layout logits, ref;  // ref.address 0: no reference
  uintptr_t targets = 0;
  long long target_stride = 1;
  int target_bytes = 8;
  long long ignore_index = -100;
  float inverse_temperature = 1;
  uintptr_t temperatures = 0;  // one per row, fp32; 0: the number above
  uintptr_t mask = 0;          // one byte per column; 0: every column is in the support
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

// The objective and the estimator of its penalty, by their places in RLK_OBJECTIVES. `columns`: addresses, without that
// of the log-probability.
struct PolicyArguments {
  int objective, kl;  // kl -1: no penalty
  uintptr_t columns[kMaxColumns];
  float params[kMaxColumns];
  PolicyInputs per_row;
};

// The addresses of a sum over rows: one double per row, the count of rows that are done, and the sum.
struct LossSum {
  uintptr_t losses, ticket, loss;
};

// The arguments of an objective over n elements. Those from `minus` on belong to a weighted loss.
template <class S>
struct ElementwiseJob {
  const S* columns[kMaxColumns];
  S params[kMaxColumns];
  const S* weight;
  S *value, *derivative, *loss;  // value: null where it is not wanted
  double* parts;                 // one per block
  unsigned* ticket;              // null where there is one block
  long long n;
  const S* minus[2];          // columns that are taken from the first; null: none
  const unsigned char* mask;  // a weight of 1 or 0 instead of `weight`; null: none
  const int64_t* total;       // a count that divides every weight; null: none
  S share = 1;                // a factor of every weight
  S* opposite;                // where the negative of the derivative goes; null: nowhere
  bool of_loss;               // the derivative is that of the weighted loss
};

}  // namespace rlk
