// The launches of elementwise, one kernel per objective, and the places of the objectives.
#include "elementwise.cuh"

#include "launch.h"

namespace rlk {

constexpr int kBlock = 256;

template <class S>
void elementwise(const char* objective, const ElementwiseJob<S>& job, Where where) {
  const std::string name = std::string("elementwise<") + objective + ">";
  const OnDevice guard(name, where.device);
  if (job.ticket) clear_ticket(name, reinterpret_cast<uintptr_t>(job.ticket), where);
  const Grid grid{elementwise_parts(job.n), kBlock, elementwise_shared<kBlock>()};
#define RLK_RUN(objective_, columns, params)    \
  if (std::strcmp(objective, #objective_) == 0) \
    return launch(name, elementwise<rlk::objective_, columns, params, S, kBlock>, grid, where, job);
  RLK_OBJECTIVES(RLK_RUN)
#undef RLK_RUN
  throw std::runtime_error(name + ": not compiled in");
}

template void elementwise(const char*, const ElementwiseJob<float>&, Where);
template void elementwise(const char*, const ElementwiseJob<double>&, Where);

long long elementwise_parts(long long n) { return (n + kPart - 1) / kPart; }

int objective_id(const char* name) {
  int id = 0;
#define RLK_PLACE(objective, columns, params)        \
  if (std::strcmp(name, #objective) == 0) return id; \
  ++id;
  RLK_OBJECTIVES(RLK_PLACE)
#undef RLK_PLACE
  return -1;
}

Choices& choices() {
  static Choices forced;
  return forced;
}

}  // namespace rlk
