// Launches of token_stats; compiled once per dtype (-DRLK_DTYPE=f32|bf16|f16).
#include "token_stats.cuh"

#include "launch.h"

namespace rlk {

template <Dtype D>
void token_stats(const Rows& rows, const StatsOutputs& out, Where where) {
  using T = typename LogitsOf<D>::type;
  constexpr int kBlock = 512;
  const std::string name = kernel_name("token_stats", D);
  const OnDevice guard(name, where.device);
  const auto run = [&](auto kernel) { launch(name, kernel, Grid{rows.rows, kBlock, kRecordBytes}, where, rows, out); };
  const bool everything = out.log_sum_sq || out.mean_logits || out.is_top1;
  if (rows.ref.address) {
    if (everything) return run(token_stats<T, kWeighted | kEverything | kReference, kBlock>);
    return run(token_stats<T, kWeighted | kReference, kBlock>);
  }
  if (everything) return run(token_stats<T, kWeighted | kEverything, kBlock>);
  if (out.entropy) return run(token_stats<T, kWeighted, kBlock>);
  return run(token_stats<T, 0, kBlock>);
}

template void token_stats<Dtype::RLK_DTYPE>(const Rows&, const StatsOutputs&, Where);

}  // namespace rlk
