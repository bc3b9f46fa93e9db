// The instruction set, chosen once when the module is loaded, and the kernels that belong to it. Whether AMX serves is
// asked later.
#include <cstdlib>
#include <vector>

#include "arguments.h"
#include "gemm.h"

#if defined(RLK_X86)
#include <cpuid.h>
#endif

#if defined(RLK_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rlk {
namespace {

enum Isa { kBaseline, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best() {
#if defined(RLK_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kBaseline;
}

const char* wish() {
  const char* name = std::getenv("RLKERNELS_CPU_ISA");
  return name && *name ? name : nullptr;
}

Isa choose() {
  const Isa most = best();
  for (int isa = kBaseline; wish() && isa < most; ++isa)
    if (std::strcmp(wish(), kNames[isa]) == 0) return Isa(isa);
  return most;
}

const Isa kIsa = choose();

// Asks the processor itself, because not every compiler that has the instructions knows their name in
// __builtin_cpu_supports. The system saves the registers wherever that reports "avx512f".
bool has_bf16() {
#if defined(RLK_BF16)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return kIsa == kAvx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
  return false;
#endif
}

const bool kBf16 = has_bf16();

// Whether the processor has AMX with bf16, and Linux lets this process use its registers. They are 8 KiB, which a
// thread's signal stack must hold, so that Linux gives them to those alone that ask. It refuses where a signal stack is
// too small. Other kernels, and sandboxes that imitate one, do not know the call.
bool may_use_tiles() {
#if defined(RLK_AMX)
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16Tiles = 1u << 22 | 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16Tiles) != kBf16Tiles) return false;
  // Palette 1: 8 registers of 1024 bytes, 64 bytes a row, 16 rows.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || a >> 16 < 1024 || (b & 0xffff) < 64 || b >> 16 < 8 ||
      (c & 0xffff) < 16)
    return false;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Asked at the first bf16 matmul, not when the module is loaded, because a process that may use the registers can no
// longer have a small signal stack.
bool with_amx() {
  static const bool chosen = kBf16 && (!wish() || std::strcmp(wish(), "amx") == 0) && may_use_tiles();
  return chosen;
}

// MKL is torch's matmul on x86, and is written for Intel's processors. On two cores of Zen 4 it reaches 158 to 196
// GFLOP/s, and ours 194 to 204. On one core of a Xeon ours takes 0.99 to 1.19 of its time.
bool made_by_amd() {
#if defined(RLK_X86)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
#else
  return false;
#endif
}

const bool kAmd = made_by_amd();

}  // namespace

const char* isa() { return with_amx() ? "amx" : kNames[kIsa]; }

const char* isa_refused() { return wish() && std::strcmp(wish(), isa()) != 0 ? wish() : nullptr; }

RowKernels row_kernels(Dtype dtype) {
  if (dtype == Dtype::f64) return row_kernels_f64();
#if defined(RLK_X86)
  if (kIsa == kAvx512) return avx512::row_kernels(dtype);
  if (kIsa == kAvx2) return avx2::row_kernels(dtype);
#endif
  return baseline::row_kernels(dtype);
}

void add_rounding(const Rounding& job) {
#if defined(RLK_BF16)
  std::vector<Kept> kept(size_t(job.rows));
  if (kBf16) avx512_bf16::add_rounding(job, kept.data());
#else
  (void)job;
#endif
}

bool gemm_f32_preferred() { return kAmd && gemm_f32_available(); }

GemmKernels gemm_f32_kernels() {
#if defined(RLK_X86)
  if (kIsa == kAvx512) return avx512::gemm_f32_kernels();
#endif
  return {};
}

GemmKernels gemm_kernels() {
#if defined(RLK_AMX)
  if (with_amx()) return amx::gemm_kernels();
#endif
#if defined(RLK_BF16)
  if (kBf16) return avx512_bf16::gemm_kernels();
#endif
  return {};
}

}  // namespace rlk
