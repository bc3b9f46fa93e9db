// A CUDA runtime that runs nothing, for host code as nvcc compiles it: registration, real headers, real launch calls.
//
// What is asked for is printed, a line of JSON per call. A launch that a driver would refuse is refused. The device is
// a stand-in for an H100. cuda_host_runtime.h does the same for the kernels as the host's compiler builds them, and
// runs them; this one is for what nvcc alone adds.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <string>

namespace {

struct Function {
  std::string name;
  int shared = 48 * 1024, carveout = -1;
};
// Made when it is first asked for, because kernels are registered before main.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}
int device = 0;
std::string failing;

cudaError_t answer(const char* call, cudaError_t otherwise = cudaSuccess) {
  if (failing != call) return otherwise;
  failing.clear();
  return cudaErrorInvalidValue;
}

}  // namespace

void stand_in_fail(const char* call) { failing = call; }
int stand_in_device() { return device; }

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  functions()[host].name = name;
}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
// The <<< >>> of a kernel's stub, which csrc/cuda never takes.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInvalidDevice      ? "invalid device ordinal"
                                                : "invalid argument";
}
cudaError_t cudaGetDevice(int* to) {
  *to = device;
  return answer("cudaGetDevice");
}
cudaError_t cudaSetDevice(int to) {
  if (to < 0 || to > 1) return cudaErrorInvalidDevice;
  const cudaError_t error = answer("cudaSetDevice");
  if (error == cudaSuccess) device = to;
  return error;
}
cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr what, int) {
  *to = what == cudaDevAttrMultiProcessorCount                ? 132
        : what == cudaDevAttrComputeCapabilityMajor           ? 9
        : what == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 * 1024
        : what == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? 227 * 1024
                                                              : -1;
  return answer("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute what, int value) {
  if (!functions().count(function)) return cudaErrorInvalidDeviceFunction;
  Function& of = functions()[function];
  const bool shared = what == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (!shared && what != cudaFuncAttributePreferredSharedMemoryCarveout) return cudaErrorInvalidValue;
  if (value > (shared ? 227 * 1024 : 100)) return cudaErrorInvalidValue;
  (shared ? of.shared : of.carveout) = value;
  return answer("cudaFuncSetAttribute");
}
cudaError_t cudaMemsetAsync(void*, int value, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = answer("cudaMemsetAsync");
  if (error == cudaSuccess)
    std::printf("{\"call\": \"memset\", \"device\": %d, \"value\": %d, \"bytes\": %zu, \"stream\": %zu}\n", device,
                value, bytes, reinterpret_cast<size_t>(stream));
  return error;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  const bool known = functions().count(function) > 0;
  const Function of = known ? functions()[function] : Function();
  const bool wrong = !known || int(config->dynamicSmemBytes) > of.shared || !config->gridDim.x ||
                     config->gridDim.x % cluster || !config->blockDim.x || config->blockDim.x > 1024 || cluster > 8;
  const cudaError_t error = answer("cudaLaunchKernelEx", wrong ? cudaErrorInvalidConfiguration : cudaSuccess);
  if (error != cudaSuccess) return error;
  std::printf(
      "{\"call\": \"launch\", \"kernel\": \"%s\", \"device\": %d, \"blocks\": %u, \"threads\": %u, \"shared\": %zu, "
      "\"cluster\": %u, \"carveout\": %d, \"stream\": %zu}\n",
      of.name.c_str(), device, config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, cluster, of.carveout,
      reinterpret_cast<size_t>(config->stream));
  return cudaSuccess;
}

}  // extern "C"
