// out (+)= a b with bf16 operands and the fp32 accumulator kept (torch rounds it to bf16, which costs a logit of 10 up to 3e-2), or all in fp32.
//
// Products of two bf16 are exact in fp32. VDPBF16PS adds the two products of a pair (k, k + 1) one after the other, the odd one first,
// each sum rounded to nearest even whatever MXCSR says; it reads and writes subnormal numbers as zero: operands, products and sums below
// 1.2e-38 vanish. The fp32 product adds one fused multiply-add after the other.
// The order of one element's sum depends on K alone: runs of kRun, run after run within a slice of K, slice after slice within out. M, N,
// the place of the element, strides, blocks and threads do not enter, so a row has the same bits in any batch.
#pragma once
#include <cstdint>

namespace rlk {

// Element (i, j) is at address + i * row + j * column, in elements; `wide`: fp32, which is rounded to bf16 while it is packed unless all is fp32.
struct Operand {
  uintptr_t address;
  int64_t row, column;
  bool wide;
};

struct GemmJob {
  int64_t m, n, k;
  Operand a, b;  // b in fp32: a too, and nothing is rounded
  float* out;  // [m, n], unit column stride
  int64_t out_row;
  bool accumulate;
  int threads;
};

bool gemm_available();      // of bf16
bool gemm_f32_available();
bool gemm_f32_preferred();  // where the library's own product falls behind: see isa.cpp
void gemm(const GemmJob&);  // only where available; throws std::bad_alloc before anything is written

constexpr int kLanes = 16;                               // rows of a, or columns of b, packed at a time
constexpr int kTileRows = 8, kTileColumns = 3 * kLanes;  // of out, in 24 of 32 registers; a row of b and a pair of a fill the rest
constexpr int64_t kSlice = 256;                          // words of K packed at a time: 512 elements of bf16, 256 of fp32
// Words of K added up in registers before they join the sum of the slice. bf16 logits of standard deviation 10, K = 1024, rms error against
// float64: 0.8e-6 at 32, 0.9e-6 at 64, 1.1e-6 at 128, 1.6e-6 at 256, torch in fp32 1.0e-6. Time over that of 256: 1.3 % at 32, 0.4 % at 64.
constexpr int64_t kRun = 64;

// Rows of a, or columns of b, within one slice: lane l holds `depth` elements at address + l * lane + k * along, in elements.
struct Block {
  uintptr_t address;
  int64_t lane, along, lanes, depth;
  bool wide;
};

// Where word p of lane l goes: to + l / 16 * group + l % 16 / 8 * half + l % 8 + p * step.
struct Panels {
  uint32_t* to;
  int64_t group, half, step;
};

// One tile of out from a packed panel of a and one of b.
struct Tile {
  const uint32_t *a, *b;
  int64_t depth;
  float* out;
  int64_t out_row;
  int rows, columns;
  bool add;     // to what is in out
  bool stream;  // store around the cache; out is then aligned to 64 bytes in every row
};

// What depends on the instruction set: gemm_bf16.cpp, compiled for AVX512_BF16, and gemm_f32.cpp, compiled for AVX-512.
struct GemmKernels {
  // Pairs (k, k + 1) of each lane as one 32-bit word, or an fp32 element; zeros behind an odd depth, and in the lanes that fill up the last
  // group of 16.
  void (*pack)(const Block&, const Panels&);
  void (*tile)(const Tile&);
  void (*fence)();  // after the last streamed store of a thread
  int64_t elements;  // of K in a word
};

// A product's operands after it, and its results: see gemm_rounding.cpp. Null where a gradient is not wanted.
struct Rounding {
  int64_t rows, columns, width;
  const float* dlogits;
  int64_t dlogits_row;
  const uint16_t* weight;  // [columns, width]
  int64_t weight_row;
  const uint16_t* hidden;  // [rows, width]
  int64_t hidden_row;
  float* dhidden;
  int64_t dhidden_row;
  float* dweight;
  int64_t dweight_row;
  int threads;
};
struct Kept {  // elements of one row of dlogits, and what rounding took from them
  int count;
  int64_t column[40];
  float lost[40];
};
void add_rounding(const Rounding&);  // only where available

namespace avx512 {
GemmKernels gemm_f32_kernels();
}
namespace avx512_bf16 {
GemmKernels gemm_kernels();
void add_rounding(const Rounding&, Kept* kept);  // kept: one per row; allocated elsewhere, no library template is compiled for AVX-512
}
// Null pointers where this machine, this build or RLKERNELS_CPU_ISA lacks the instructions.
GemmKernels gemm_kernels();
GemmKernels gemm_f32_kernels();

}  // namespace rlk
