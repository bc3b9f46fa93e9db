// An objective of rows, chosen by its place in RLK_OBJECTIVES. A switch, because it is taken once per row and a row
// costs as much as a vocabulary.
#pragma once
#include "platform.cuh"

namespace rlk {

enum ObjectiveId : int {
#define RLK_ID(name, columns, params) id_##name,
  RLK_OBJECTIVES(RLK_ID)
#undef RLK_ID
};

// Columns and parameters of any objective. Constant, so that arrays of them stay in registers.
constexpr int kWidest = 4;

template <class S>
__device__ inline Term<S> evaluate_objective(int id, const S (&columns)[kWidest], const S (&params)[kWidest]) {
  switch (id) {
#define RLK_CASE(name, n_columns, n_params)                                               \
  case id_##name:                                                                         \
    static_assert(n_columns <= kWidest && n_params <= kWidest, "raise kWidest");          \
    return evaluate<rlk::name, S>(columns, params, std::make_index_sequence<n_columns>{}, \
                                  std::make_index_sequence<n_params>{});
    RLK_ROW_OBJECTIVES(RLK_CASE)
#undef RLK_CASE
  }
  return {S(NAN), S(NAN)};
}

}  // namespace rlk
