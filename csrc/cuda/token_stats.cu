// The launches of token_stats. Compiled once per dtype of the logits (-DRLK_DTYPE=f32|bf16|f16).
#include "token_stats.cuh"

#include <type_traits>

#include "launch.h"

namespace rlk {

template <unsigned kSums>
using Summed = std::integral_constant<unsigned, kSums>;

template <Dtype D>
void token_stats(const Rows& rows, const StatsOutputs& out, Where where) {
  using T = typename LogitsOf<D>::type;
  const std::string name = kernel_name("token_stats", D);
  const OnDevice guard(name, where.device);
  const auto run = [&](auto sums) {
    constexpr unsigned kSums = decltype(sums)::value;
    constexpr int kBlock = kRowThreads<T, kSums>;
    launch(name, token_stats<T, kSums, kBlock>, Grid{rows.rows, kBlock, kRecordBytes}, where, rows, out);
  };
  const unsigned wanted = out.wanted();
  const bool extra = wanted & (kLogSumSq | kMeanLogits | kIsTop1);
  if (rows.ref.address) {
    if (extra) return run(Summed<kSumsWeighted | kSumsExtra | kSumsReference>());
    return run(Summed<kSumsWeighted | kSumsReference>());
  }
  if (extra) return run(Summed<kSumsWeighted | kSumsExtra>());
  if (wanted & kEntropy) return run(Summed<kSumsWeighted>());
  return run(Summed<0>());
}

template void token_stats<Dtype::RLK_DTYPE>(const Rows&, const StatsOutputs&, Where);

}  // namespace rlk
