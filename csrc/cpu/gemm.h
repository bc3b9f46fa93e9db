// out (+)= a b with bf16 operands, the fp32 accumulator kept: torch rounds it to bf16, which costs a logit of 10 up to 3e-2.
//
// Products of two bf16 are exact in fp32. VDPBF16PS adds the two products of a pair (k, k + 1) one after the other, the odd one first,
// each sum rounded to nearest even whatever MXCSR says; it reads and writes subnormal numbers as zero: operands, products and sums below
// 1.2e-38 vanish.
// The order of one element's sum depends on K alone: VDPBF16PS over runs of kRun, run after run within a slice of kDepth, slice after
// slice within out. M, N, the place of the element, strides, blocks and threads do not enter, so a row has the same bits in any batch.
#pragma once
#include <cstdint>

namespace rlk {

// Element (i, j) is at address + i * row + j * column, in elements; bf16, or fp32 that is rounded to bf16 while it is packed.
struct Operand {
  uintptr_t address;
  int64_t row, column;
  bool wide;
};

struct GemmJob {
  int64_t m, n, k;
  Operand a, b;
  float* out;  // [m, n], unit column stride
  int64_t out_row;
  bool accumulate;
  int threads;
};

bool gemm_available();
void gemm(const GemmJob&);  // only where available; throws std::bad_alloc before anything is written

constexpr int kLanes = 16;                               // rows of a, or columns of b, packed at a time
constexpr int kTileRows = 8, kTileColumns = 3 * kLanes;  // of out, in 24 of 32 registers; a row of b and a pair of a fill the rest
constexpr int64_t kDepth = 512;                          // elements of K packed at a time
// Elements of K added up in registers before they join the sum of the slice. Logits of standard deviation 10, K = 1024, rms error against
// float64: 0.8e-6 at 64, 0.9e-6 at 128, 1.1e-6 at 256, 1.6e-6 at 512, torch in fp32 1.0e-6. Time over that of 512: 1.3 % at 64, 0.4 % at 128.
constexpr int64_t kRun = 128;

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

// gemm_tiles.cpp, compiled for AVX512_BF16: what depends on the instruction set.
struct GemmKernels {
  // Pairs (k, k + 1) of each lane as one 32-bit word; zeros behind an odd depth, and in the lanes that fill up the last group of 16.
  void (*pack)(const Block&, const Panels&);
  void (*tile)(const Tile&);
  void (*fence)();  // after the last streamed store of a thread
};

// A product's operands after it, and its results: see rounding.cpp. Null where a gradient is not wanted.
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

namespace avx512_bf16 {
GemmKernels gemm_kernels();
void add_rounding(const Rounding&, Kept* kept);  // kept: one per row; allocated elsewhere, no library template is compiled for AVX-512
}
GemmKernels gemm_kernels();  // null pointers where this machine, this build or RLKERNELS_CPU_ISA has no AVX512_BF16

}  // namespace rlk
