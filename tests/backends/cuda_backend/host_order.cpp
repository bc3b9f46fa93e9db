// What Python says to the CPU build, and asks of it: the order in which threads run (forward, reverse or
// random:<seed>), the launches since the last question, and the call of the runtime that is to fail next,
// and whether kernels run at all.
#include "cuda_host_runtime.h"

#define CUDA_HOST_EXPORT extern "C" __attribute__((visibility("default")))

CUDA_HOST_EXPORT void cuda_host_order(const char* order) { cuda_host::set_order(order); }
CUDA_HOST_EXPORT const char* cuda_host_record() {
  static std::string told;
  told = std::move(cuda_host::record);
  cuda_host::record.clear();
  return told.c_str();
}
CUDA_HOST_EXPORT void cuda_host_fail(const char* call) { cuda_host::failing = call; }
CUDA_HOST_EXPORT int cuda_host_device() { return cuda_host::device; }
CUDA_HOST_EXPORT void cuda_host_runs(int kernels) { cuda_host::runs = kernels; }
