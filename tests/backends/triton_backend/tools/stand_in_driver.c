// A CUDA driver that runs nothing: Triton's launcher is told that all went well, and what was launched is remembered.
//
// It has what the launchers of Triton 3.5 to 3.9 link against. The device is a stand-in for an H100.
#include <stdint.h>
#include <string.h>

#include "cuda.h"

enum { kMost = 256, kWidest = 16 };

static int sizes[kMost], count, launches, failing;
static unsigned char values[kMost][kWidest];
static uint64_t shape[8];

// Says how many bytes each parameter of the next kernel has.
void stand_in_expect(const int* of, int n) {
  count = n < kMost ? n : kMost;
  memcpy(sizes, of, count * sizeof *of);
  launches = 0;
}
int stand_in_launches(void) { return launches; }
void stand_in_value(int k, void* to) { memcpy(to, values[k], sizes[k]); }
// The grid, threads, bytes of shared memory, stream, function.
void stand_in_shape(uint64_t* to) { memcpy(to, shape, sizeof shape); }
void stand_in_fail(int next) { failing = next; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  (void)extra;
  const uint64_t found[8] = {config->gridDimX,
                             config->gridDimY,
                             config->gridDimZ,
                             config->blockDimX,
                             config->sharedMemBytes,
                             (uint64_t)(uintptr_t)config->hStream,
                             (uint64_t)(uintptr_t)function,
                             config->numAttrs};
  if (failing) return failing = 0, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  memcpy(shape, found, sizeof shape);
  for (int k = 0; k < count; ++k) memcpy(values[k], parameters[k], sizes[k]);
  ++launches;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* to) { return *to = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* to) { return *to = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* to, int ordinal) { return *to = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* to, CUdevice_attribute what, CUdevice device) {
  (void)device;
  *to = what == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
        : what == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT            ? 132
        : what == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK         ? 65536
        : what == CU_DEVICE_ATTRIBUTE_WARP_SIZE                       ? 32
        : what == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR        ? 9
                                                                      : 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* to, CUdevice device) {
  return (void)device, *to = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* to) { return *to = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* to) { return *to = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* to, CUlimit what) { return (void)what, *to = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit what, size_t value) { return (void)what, (void)value, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* to, const void* image) { return (void)image, *to = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* to, CUmodule module, const char* name) {
  return (void)module, (void)name, *to = (CUfunction)1, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* to, CUfunction_attribute what, CUfunction function) {
  (void)function;
  *to = what == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) {
  return (void)function, (void)what, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return (void)function, (void)config, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** to) {
  return *to = error == CUDA_SUCCESS ? "no error" : "too many resources requested for launch", CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* to, CUpointer_attribute what, CUdeviceptr pointer) {
  return (void)what, *(CUdeviceptr*)to = pointer, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* to) {
  return (void)stream, *to = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
