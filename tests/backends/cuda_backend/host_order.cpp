// The order in which the threads of the CPU build run, for Python: forward, reverse or random:<seed>.
#include "cuda_host.h"

extern "C" __attribute__((visibility("default"))) void cuda_host_order(const char* order) {
  cuda_host::set_order(order);
}
