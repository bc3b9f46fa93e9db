// The launches of fused_policy. Compiled once per dtype of the logits (-DRLK_DTYPE=f32|bf16|f16) and dtype of their
// gradient (-DRLK_OUT).
#include "fused_policy.cuh"

#include <algorithm>

#include "launch.h"

namespace rlk {

// The number of blocks that share a row, and -1 where none hold it. Taken are the fewest with which a multiprocessor
// holds 20 warps. Where no number does, the one with most warps is taken. A block that is alone there counts half,
// because nothing hides its reduction. A guess from a model, because nobody has measured it.
template <class T>
int choose_cluster(const std::string& name, long long columns, int device) {
  const long long block_limit = shared_limit(name, device), limit = shared_per_multiprocessor(name, device);
  const int most = has_clusters(name, device) ? 8 : 1;
  int best = -1, warps = 0;
  for (int cluster = 1; cluster <= most && warps < 20; cluster *= 2) {
    const int block = cluster == 8 ? 128 : 256;
    const long long shared = slot_bytes<T>(columns, cluster) + kFixedBytes;
    if (shared > block_limit) continue;
    const int blocks = int(std::min(limit / (shared + 1024), (long long)blocks_by_registers<T>(block, true)));
    const int found = blocks * block / 32 / (blocks == 1 ? 2 : 1);
    if (found > warps) best = cluster, warps = found;
  }
  return best;
}

template <Dtype D, Dtype O>
void fused_policy(const Rows& rows, const PolicyArguments& in, const PolicyOutputs& out, const LossSum& total,
                  const Layout& gradient, Where where) {
  using T = typename LogitsOf<D>::type;
  using Out = typename LogitsOf<O>::type;
  const std::string name = kernel_name("fused_policy", D, O);
  const OnDevice guard(name, where.device);
  clear_ticket(name, total.ticket, where);
  const auto run = [&](auto kernel, int block, int cluster, bool keep) {
    const long long shared = kFixedBytes + (keep ? slot_bytes<T>(rows.columns, cluster) : 0);
    launch(name, kernel, Grid{rows.rows * cluster, block, shared, cluster}, where, rows, in, out, total, gradient);
  };
  // Without a gradient no row is kept, because nothing is read twice.
  const int forced = choices().fused_cluster;
  switch (!gradient.address ? -1 : forced ? forced : choose_cluster<T>(name, rows.columns, where.device)) {
    case 1: return run(fused_policy<T, Out, 256, 1, true>, 256, 1, true);
    case 2: return run(fused_policy<T, Out, 256, 2, true>, 256, 2, true);
    case 4: return run(fused_policy<T, Out, 256, 4, true>, 256, 4, true);
    case 8: return run(fused_policy<T, Out, 128, 8, true>, 128, 8, true);
    default: return run(fused_policy<T, Out, 512, 1, false>, 512, 1, false);
  }
}

template void fused_policy<Dtype::RLK_DTYPE, Dtype::RLK_OUT>(const Rows&, const PolicyArguments&, const PolicyOutputs&,
                                                             const LossSum&, const Layout&, Where);

}  // namespace rlk
