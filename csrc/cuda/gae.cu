// The launches of gae.
#include "gae.cuh"

#include "launch.h"

namespace rlk {

template <class Real>
void gae(const GaeJob<Real>& job, Where where) {
  constexpr int kBlock = 256, kItems = 8;
  const OnDevice guard("gae", where.device);
  launch("gae", gae<Real, kBlock, kItems>, Grid{job.sequences, kBlock, gae_shared<Real, kBlock, kItems>()}, where, job);
}

template void gae(const GaeJob<float>&, Where);
template void gae(const GaeJob<double>&, Where);

}  // namespace rlk
