// The launches of token_stats_backward. Compiled once per dtype of the logits (-DRLK_DTYPE=f32|bf16|f16) and dtype of
// their gradient (-DRLK_OUT).
#include "backward.cuh"

#include <algorithm>

#include "launch.h"

namespace rlk {

template <Dtype D, Dtype O>
void token_stats_backward(const Rows& rows, const BackwardInputs& in, uintptr_t unless, const Layout& out,
                          Where where) {
  using T = typename LogitsOf<D>::type;
  using Out = typename LogitsOf<O>::type;
  constexpr int kBlock = 256;
  const std::string name = kernel_name("token_stats_backward", D, O);
  const OnDevice guard(name, where.device);
  // Eight groups per thread, because that is enough arithmetic to pay for the beginning of a slice and small enough to
  // fill the chip with few rows.
  const long long slice = choices().backward_slice ? choices().backward_slice : (long long)kBlock * kGroup * 8;
  const long long slices = (rows.columns + slice - 1) / slice;
  // With `unless` no more blocks than run at once, because most often each of them reads one number and ends: a block
  // per slice would be 81,920 blocks of that kind for [8192, 151936].
  const long long jobs = rows.rows * slices,
                  blocks = unless ? std::min(jobs, 4LL * multiprocessors(name, where.device)) : jobs;
  const auto run = [&](auto kernel) {
    launch(name, kernel, Grid{blocks, kBlock}, where, rows, in, unless, out, slices, slice);
  };
  if (!in.dkl) return run(token_stats_backward<T, Out, false, kBlock>);
  if constexpr (D == O) return run(token_stats_backward<T, Out, true, kBlock>);
  throw std::invalid_argument(name + ": the gradient of a KL to other logits has the dtype of the logits");
}

template void token_stats_backward<Dtype::RLK_DTYPE, Dtype::RLK_OUT>(const Rows&, const BackwardInputs&, uintptr_t,
                                                                     const Layout&, Where);

}  // namespace rlk
