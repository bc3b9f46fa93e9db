// Launches of token_stats_backward; compiled once per dtype (-DRLK_DTYPE=f32|bf16|f16).
#include "backward.cuh"

#include "launch.h"

namespace rlk {

template <Dtype D>
void token_stats_backward(const Rows& rows, const BackwardInputs& in, const Layout& out, Where where) {
  using T = typename LogitsOf<D>::type;
  constexpr int kBlock = 256;
  const std::string name = kernel_name("token_stats_backward", D);
  const OnDevice guard(name, where.device);
  // Eight groups per thread: enough arithmetic to pay for a slice's own beginning, small enough to fill the chip with few rows.
  const long long slice = choices().backward_slice ? choices().backward_slice : (long long)kBlock * kGroup * 8;
  const long long slices = (rows.columns + slice - 1) / slice;
  const auto run = [&](auto kernel) { launch(name, kernel, Grid{rows.rows * slices, kBlock}, where, rows, in, out, slices, slice); };
  if (in.dkl) return run(token_stats_backward<T, true, kBlock>);
  return run(token_stats_backward<T, false, kBlock>);
}

template void token_stats_backward<Dtype::RLK_DTYPE>(const Rows&, const BackwardInputs&, const Layout&, Where);

}  // namespace rlk
