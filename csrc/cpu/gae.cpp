// Generalised advantage estimation: one reverse scan per sequence, in double.
#include "arguments.h"

namespace rlk {

template <class Real>
void gae(const GaeJob<Real>& job, int threads) {
  const uint8_t* const mask = job.masked == Masked::none ? nullptr : job.mask;
  const int64_t tokens = job.bounds ? job.bounds[job.sequences] : job.sequences * job.length;
  for_rows(job.sequences, job.sequences ? tokens / job.sequences : 0, threads, [=](int64_t s) {
    const int64_t begin = job.bounds ? job.bounds[s] : s * job.length,
                  end = job.bounds ? job.bounds[s + 1] : begin + job.length;
    double trace = 0, next_value = 0;
    for (int64_t t = end - 1; t >= begin; --t) {
      const bool live = !mask || mask[t];
      // A dead position is not read, because anything may stand there.
      if (live || job.masked == Masked::zero) {
        const double reward = live ? double(job.rewards[t]) : 0.0, value = live ? double(job.values[t]) : 0.0;
        trace = reward + job.gamma * next_value - value + job.gamma * job.lam * trace;
        next_value = value;
      }
      job.advantages[t] = live ? Real(trace) : Real(0);
      job.returns[t] = live ? Real(trace + next_value) : Real(0);
    }
  });
}

template void gae(const GaeJob<float>&, int);
template void gae(const GaeJob<double>&, int);

}  // namespace rlk
