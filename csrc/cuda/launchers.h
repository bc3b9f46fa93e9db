// The functions that the bindings call. They take no CUDA type: a device is a number, and a stream is an address.
#pragma once
#include "arguments.h"

namespace rlk {

struct Where {
  int device = 0;
  uintptr_t stream = 0;
};

// Launch choices that a measurement forces. 0 leaves the usual choice. No result depends on them.
struct Choices {
  int fused_cluster = 0;         // 1, 2, 4, 8: blocks that share a row; -1: two sweeps over device memory
  long long backward_slice = 0;  // columns per block, a multiple of 8
};
Choices& choices();

template <Dtype>
void token_stats(const Rows&, const StatsOutputs&, Where);
// Logits and their gradient have one dtype, or the logits are fp32. A gradient of another dtype never lies over the
// logits. unless: the address of one number, or 0. Where that number is exactly 1, nothing is written.
template <Dtype, Dtype>
void token_stats_backward(const Rows&, const BackwardInputs&, uintptr_t unless, const Layout& out, Where);
// Writes no gradient where gradient.address is 0.
template <Dtype, Dtype>
void fused_policy(const Rows&, const PolicyArguments&, const PolicyOutputs&, const LossSum&, const Layout& gradient,
                  Where);
template <class S>
void elementwise(const char* objective, const ElementwiseJob<S>&, Where);
template <class Real>
void gae(const GaeJob<Real>&, Where);

int objective_id(const char* name);        // its place in RLK_OBJECTIVES, or -1
long long elementwise_parts(long long n);  // blocks of elementwise over n elements

}  // namespace rlk
