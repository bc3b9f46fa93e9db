// The dtypes of logits, and the table from the name of an objective to its functor.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "objectives.h"

namespace rlk {

enum class Dtype : int { f32, bf16, f16, f64 };
inline int64_t item_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

constexpr int kMaxColumns = 8;  // size of the arrays of columns and of parameters, more than any objective has

// An objective behind a function pointer, for callers that evaluate it once per row.
template <class S>
struct Objective {
  const char* name;
  int columns, params;
  Term<S> (*evaluate)(const S* columns, const S* params);
};

template <class F, class S, size_t... C, size_t... P>
RLK_HD Term<S> evaluate(const S* columns, const S* params, std::index_sequence<C...>, std::index_sequence<P...>) {
  (void)params;
  return F{}(columns[C]..., params[P]...);
}

template <class F, class S, int C, int P>
Term<S> evaluate(const S* columns, const S* params) {
  static_assert(C <= kMaxColumns && P <= kMaxColumns, "raise kMaxColumns");
  return evaluate<F, S>(columns, params, std::make_index_sequence<C>{}, std::make_index_sequence<P>{});
}

// The objective of that name, or null, because an objective of a user is not compiled in.
template <class S>
const Objective<S>* find_objective(const char* name) {
#define RLK_ROW(name, columns, params) {#name, columns, params, evaluate<rlk::name, S, columns, params>},
  static constexpr Objective<S> table[] = {RLK_OBJECTIVES(RLK_ROW)};
#undef RLK_ROW
  for (const auto& row : table)
    if (std::strcmp(row.name, name) == 0) return &row;
  return nullptr;
}

}  // namespace rlk
