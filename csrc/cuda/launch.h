// A launch on the tensors' device and on the caller's stream. It is checked, and an error names the kernel.
#pragma once
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace rlk {

struct Grid {
  long long blocks;
  int threads;
  long long shared = 0;
  int cluster = 1;
};

inline void check_grid(const char* name, const Grid& grid) {
  if (grid.blocks > 0x7fffffff)  // the limit of axis 0, which is far larger than that of the others
    throw std::runtime_error(std::string(name) + ": " + std::to_string(grid.blocks) +
                             " blocks in one launch; split the rows");
}

inline const char* dtype_name(Dtype dtype) {
  return dtype == Dtype::bf16  ? "bfloat16"
         : dtype == Dtype::f16 ? "float16"
         : dtype == Dtype::f32 ? "float32"
                               : "float64";
}

inline std::string kernel_name(const char* op, Dtype dtype) { return std::string(op) + "<" + dtype_name(dtype) + ">"; }
inline std::string kernel_name(const char* op, Dtype dtype, Dtype out) {
  return dtype == out ? kernel_name(op, dtype)
                      : std::string(op) + "<" + dtype_name(dtype) + " to " + dtype_name(out) + ">";
}

}  // namespace rlk

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else  // a stand-in for the runtime, because the tests run launches and kernels on the CPU
#include "cuda_host_runtime.h"
#endif

namespace rlk {

inline void check(const std::string& name, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, because the next caller must not report it again
  throw std::runtime_error(name + ": " + cudaGetErrorString(error));
}

// Makes a device the current one, and the caller's current one again at the end.
class OnDevice {
 public:
  OnDevice(const std::string& name, int device) {
    check(name, cudaGetDevice(&before_));
    if (before_ != device) check(name, cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int device_attribute(const std::string& name, cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(name, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}
inline long long shared_limit(const std::string& name, int device) {
  return device_attribute(name, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
inline long long shared_per_multiprocessor(const std::string& name, int device) {
  return device_attribute(name, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
}
inline int multiprocessors(const std::string& name, int device) {
  return device_attribute(name, cudaDevAttrMultiProcessorCount, device);
}
inline bool has_clusters(const std::string& name, int device) {
  return device_attribute(name, cudaDevAttrComputeCapabilityMajor, device) >= 9;
}

inline void clear_ticket(const std::string& name, uintptr_t ticket, Where where) {
  check(name, cudaMemsetAsync(reinterpret_cast<void*>(ticket), 0, sizeof(unsigned),
                              reinterpret_cast<cudaStream_t>(where.stream)));
}

template <class... Parameters, class... Arguments>
void launch(const std::string& name, void (*kernel)(Parameters...), const Grid& grid, Where where,
            Arguments... arguments) {
  if (grid.blocks == 0) return;  // an empty grid is a launch error
  check_grid(name.c_str(), grid);
  if (grid.shared > 48 * 1024)
    check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared)));
  // All of it to shared memory, because by the driver's default division perhaps one block fits where three would.
  if (grid.shared > 8 * 1024)
    check(name,
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  const cudaLaunchConfig_t config{dim3(unsigned(grid.blocks)),
                                  dim3(unsigned(grid.threads)),
                                  size_t(grid.shared),
                                  reinterpret_cast<cudaStream_t>(where.stream),
                                  &cluster,
                                  grid.cluster > 1 ? 1u : 0u};
  check(name, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace rlk
