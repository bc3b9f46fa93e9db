// cuda_host_runtime.h -- the calls of the CUDA runtime that csrc/cuda/launch.h makes, for a machine without a GPU.
//
// A launch runs the kernel by cuda_host.h, in the call itself, and is remembered: the tests read what the host code
// asked for. The device is a stand-in for an H100: 132 multiprocessors, compute capability 9.0, 227 KB of shared memory
// per block. A launch that a driver would refuse is refused here too: more than 48 KB of shared memory without the
// attribute, a cluster that needs another attribute, a grid that is no multiple of its cluster, an unknown device.
#pragma once
#include <dlfcn.h>
#include "cuda_host.h"

// The members of a launch bear these names too.
#pragma push_macro("gridDim")
#pragma push_macro("blockDim")
#undef gridDim
#undef blockDim

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id{};
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val{};
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_host {
constexpr int kDevices = 2, kMultiprocessors = 132, kSharedLimit = 227 * 1024, kSharedWithoutAsking = 48 * 1024;
constexpr int kSharedOfMultiprocessor = 228 * 1024;
struct Asked {  // of one kernel, by cudaFuncSetAttribute
  int shared = kSharedWithoutAsking, carveout = -1;
};
inline int device = 0;
inline bool runs = true;  // false: a launch is remembered alone, for whoever times the host
inline std::map<const void*, Asked> asked;
inline std::string record, failing;  // JSON, a line per call; the call that is to fail next
inline cudaError_t answer(const char* call, cudaError_t otherwise) {
  if (failing != call) return otherwise;
  failing.clear();
  return cudaErrorInvalidValue;
}
inline void note(const char* call, const std::string& rest) {
  // Whether the caller holds Python's lock. Looked up, because a program without Python launches too.
  using Holds = int (*)();
  static const Holds holds = reinterpret_cast<Holds>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  record += std::string("{\"call\": \"") + call + "\", \"device\": " + std::to_string(device) +
            ", \"lock\": " + (holds && holds() ? "true" : "false") + rest + "}\n";
}
template <class T>
std::string pair(const char* name, T value) {
  return std::string(", \"") + name + "\": " + std::to_string(value);
}
}  // namespace cuda_host

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInvalidDevice      ? "invalid device ordinal"
         : error == cudaSuccess                 ? "no error"
                                                : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* to) {
  *to = cuda_host::device;
  return cuda_host::answer("cudaGetDevice", cudaSuccess);
}
inline cudaError_t cudaSetDevice(int to) {
  if (to < 0 || to >= cuda_host::kDevices) return cudaErrorInvalidDevice;
  const cudaError_t error = cuda_host::answer("cudaSetDevice", cudaSuccess);
  if (error == cudaSuccess) cuda_host::device = to;
  return error;
}
inline cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr what, int) {
  *to = what == cudaDevAttrMultiProcessorCount                ? cuda_host::kMultiprocessors
        : what == cudaDevAttrComputeCapabilityMajor           ? 9
        : what == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? cuda_host::kSharedOfMultiprocessor
                                                              : cuda_host::kSharedLimit;
  return cuda_host::answer("cudaDeviceGetAttribute", cudaSuccess);
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute what, int value) {
  cuda_host::Asked& of = cuda_host::asked[reinterpret_cast<const void*>(kernel)];
  const bool shared = what == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (value > (shared ? cuda_host::kSharedLimit : 100)) return cudaErrorInvalidValue;
  (shared ? of.shared : of.carveout) = value;
  return cuda_host::answer("cudaFuncSetAttribute", cudaSuccess);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cuda_host::answer("cudaMemsetAsync", cudaSuccess);
  if (error != cudaSuccess) return error;
  std::memset(to, value, bytes);
  cuda_host::note("memset",
                  cuda_host::pair("bytes", bytes) + cuda_host::pair("stream", reinterpret_cast<uintptr_t>(stream)));
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_host;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  const Asked of = asked[reinterpret_cast<const void*>(kernel)];
  const bool wrong = int(config->dynamicSmemBytes) > of.shared || !config->gridDim.x || config->gridDim.x % cluster ||
                     !config->blockDim.x || config->blockDim.x > 1024 || cluster > 8;
  const cudaError_t error = answer("cudaLaunchKernelEx", wrong ? cudaErrorInvalidConfiguration : cudaSuccess);
  if (error != cudaSuccess) return error;
  note("launch", pair("blocks", config->gridDim.x) + pair("threads", config->blockDim.x) +
                     pair("shared", config->dynamicSmemBytes) + pair("cluster", cluster) +
                     pair("carveout", of.carveout) + pair("stream", reinterpret_cast<uintptr_t>(config->stream)));
  if (runs)
    launch({config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster}, [=] { kernel(arguments...); });
  return cudaSuccess;
}

#pragma pop_macro("blockDim")
#pragma pop_macro("gridDim")
