// The launches of csrc/cuda for bf16, as nvcc compiles the host code, over a runtime that runs nothing. Prints what the
// runtime is asked for, a line of JSON per call.
//
//     nvcc_launches <kernel> <rows> <columns> [<runtime's call that is to fail>]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "launchers.h"

void stand_in_fail(const char* call);
int stand_in_device();

using namespace rlk;

// Defined with the objectives, which are not built here.
Choices& rlk::choices() {
  static Choices chosen;
  return chosen;
}

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const char* const kernel = argv[1];
  Rows rows;
  rows.dtype = Dtype::bf16, rows.rows = std::atoll(argv[2]), rows.columns = std::atoll(argv[3]);
  rows.logits = {0x10000, rows.columns, 0, 1};
  const Layout gradient{0x20000, rows.columns, 0, 1};
  const Where where{1, 77};
  if (argc > 4) stand_in_fail(argv[4]);
  try {
    if (!std::strcmp(kernel, "token_stats")) token_stats<Dtype::bf16>(rows, StatsOutputs{}, where);
    if (!std::strcmp(kernel, "token_stats_backward"))
      token_stats_backward<Dtype::bf16, Dtype::bf16>(rows, BackwardInputs{}, 0, gradient, where);
    if (!std::strcmp(kernel, "token_stats_backward unless"))
      token_stats_backward<Dtype::bf16, Dtype::bf16>(rows, BackwardInputs{}, 0x30000, gradient, where);
    if (!std::strcmp(kernel, "fused_policy"))
      fused_policy<Dtype::bf16, Dtype::bf16>(rows, PolicyArguments{}, PolicyOutputs{}, LossSum{0, 0x40000, 0}, gradient,
                                             where);
    if (!std::strcmp(kernel, "gae")) {
      GaeJob<float> job{};
      job.sequences = rows.rows, job.length = rows.columns;
      gae<float>(job, where);
    }
  } catch (const std::exception& error) {
    std::printf("{\"call\": \"error\", \"what\": \"%s\"}\n", error.what());
  }
  std::printf("{\"call\": \"end\", \"device\": %d}\n", stand_in_device());
}
