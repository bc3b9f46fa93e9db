// The launches of token_stats. Compiled once per dtype of the logits (-DRLK_DTYPE=f32|bf16|f16).
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
  const unsigned wanted = out.wanted();
  const bool extra = wanted & (kLogSumSq | kMeanLogits | kIsTop1);
  if (rows.ref.address) {
    if (extra) return run(token_stats<T, kSumsWeighted | kSumsExtra | kSumsReference, kBlock>);
    return run(token_stats<T, kSumsWeighted | kSumsReference, kBlock>);
  }
  if (extra) return run(token_stats<T, kSumsWeighted | kSumsExtra, kBlock>);
  if (wanted & kEntropy) return run(token_stats<T, kSumsWeighted, kBlock>);
  return run(token_stats<T, 0, kBlock>);
}

template void token_stats<Dtype::RLK_DTYPE>(const Rows&, const StatsOutputs&, Where);

}  // namespace rlk
