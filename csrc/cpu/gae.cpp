// Generalised advantage estimation: one reverse scan per row or segment, in double.
#include "arguments.h"

namespace rlk {

template <class Real>
void gae(const Real* rewards, const Real* values, const uint8_t* mask, const int64_t* bounds, int64_t segments, int64_t length, double gamma,
         double lam, Masked masked, Real* advantages, Real* returns, int threads) {
  if (masked == Masked::none) mask = nullptr;
  const int64_t total = bounds ? bounds[segments] : segments * length;
  for_rows(segments, segments ? total / segments : 0, threads, [=](int64_t s) {
    const int64_t begin = bounds ? bounds[s] : s * length, end = bounds ? bounds[s + 1] : begin + length;
    double trace = 0, next_value = 0;
    for (int64_t t = end - 1; t >= begin; --t) {
      const bool live = !mask || mask[t];
      // What stands at a dead position is not read: it may be anything.
      if (live || masked == Masked::zero) {
        const double reward = live ? double(rewards[t]) : 0.0, value = live ? double(values[t]) : 0.0;
        trace = reward + gamma * next_value - value + gamma * lam * trace;
        next_value = value;
      }
      advantages[t] = live ? Real(trace) : Real(0);
      returns[t] = live ? Real(trace + next_value) : Real(0);
    }
  });
}

template void gae(const float*, const float*, const uint8_t*, const int64_t*, int64_t, int64_t, double, double, Masked, float*, float*, int);
template void gae(const double*, const double*, const uint8_t*, const int64_t*, int64_t, int64_t, double, double, Masked, double*, double*,
                  int);

}  // namespace rlk
