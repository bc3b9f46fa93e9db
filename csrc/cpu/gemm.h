// The matmul out (+)= a b, with bf16 operands and an fp32 result, or all in fp32. torch rounds the result of bf16
// operands to bf16, which costs a logit of 10 up to 3e-2.
//
// Products of two bf16 are exact in fp32. VDPBF16PS adds the two products of a pair (k, k + 1) one after the other, the
// odd one first. It rounds each sum to nearest even whatever MXCSR says. It reads and writes subnormal numbers as zero,
// so that operands, products and sums below 1.2e-38 vanish. The fp32 matmul adds one fused multiply-add after the
// other. The order of one element's sum depends on K alone: runs of kRun, run after run within a slice of K, slice
// after slice within out. M, N, the place of the element, strides, blocks and threads do not enter, so that a row has
// the same bits in any batch.
//
// TDPBF16PS, the instruction of AMX, takes 16 pairs of K. Its 16 even products make one chain of fused multiply-adds
// from zero, and its 16 odd products another. It adds the odd chain to the even one, and that to the sum of the slice.
// Zeros fill up the last 16 pairs of K. It rounds each of these sums to nearest even whatever MXCSR says, and reads and
// writes subnormal numbers as zero. (Found on a Xeon: 512,000 elements had the bits of that rule, special values too.)
// Slices are added as above. So a row has other bits than with AVX512_BF16, and again the same ones in any batch.
#pragma once
#include <cstdint>

namespace rlk {

// A matrix whose element (i, j) is at address + i * row + j * column, in elements. `wide`: it is fp32. It is then
// rounded to bf16 while it is packed, unless both operands are fp32.
struct Operand {
  uintptr_t address;
  int64_t row, column;
  bool wide;
};

struct GemmJob {
  int64_t m, n, k;
  Operand a, b;  // where b is fp32, so is a, and nothing is rounded
  float* out;    // [m, n], unit column stride
  int64_t out_row;
  bool accumulate;
  int threads;
};

bool gemm_available();  // that of bf16
bool gemm_f32_available();
bool gemm_f32_preferred();  // whether torch's own falls behind: see isa.cpp
void gemm(const GemmJob&);  // only where available; throws std::bad_alloc before anything is written

constexpr int kLanes = 16;  // rows of a, or columns of b, packed at a time
// With AVX-512 a tile of out takes 24 of 32 registers. A row of b and a pair of a fill the rest.
constexpr int kTileRows = 8, kTileColumns = 3 * kLanes;
constexpr int64_t kSlice = 256;  // words of K packed at a time: 512 elements of bf16, 256 of fp32
// Words of K that are added up in registers before they join the sum of the slice. Measured with bf16 logits of
// standard deviation 10 and K = 1024. The rms error against float64 is 0.8e-6 at 32, 0.9e-6 at 64, 1.1e-6 at 128
// and 1.6e-6 at 256, and 1.0e-6 for torch in fp32. The time over that of 256 is 1.3 % at 32 and 0.4 % at 64.
constexpr int64_t kRun = 64;

// Rows of a, or columns of b, within one slice. Lane l holds `depth` elements, and element k of it is at address + l *
// lane + k * along, in elements.
struct Block {
  uintptr_t address;
  int64_t lane, along, lanes, depth;
  bool wide;
};

// The place of packed words. Word p of lane l goes to `to` + l / 16 * group + l % 16 / 8 * half + l % 8 + p * step.
struct Panels {
  uint32_t* to;
  int64_t group, half, step;
};

// One tile of out from packed panels of a and one of b.
struct Tile {
  const uint32_t *a, *b;
  int64_t a_panel, b_group;  // words from one panel of a, or 16 columns of b, to the next, where a tile has several
  int64_t depth;
  float* out;
  int64_t out_row;
  int rows, columns;
  bool add;     // to what is in out
  bool stream;  // store around the cache, where out is aligned to 64 bytes in every row
};

// The sizes of a tile of out and of its packed operands.
struct TileShape {
  int rows, columns;
  int panel;               // rows of a in one panel, 8 or 16
  int step;                // words from one word of a column of b to the next: those of 16 columns, or of a tile
  int64_t packed_columns;  // of b at a time
  int64_t words;           // the words of a panel are filled up with zeros to a multiple of this
  int64_t max_rows;        // of a in one task
  double packing_columns;  // packing one element of a takes as long as multiplying it by so many columns of b
};

// The functions that depend on the instruction set: gemm_amx.cpp for AMX, gemm_bf16.cpp for AVX512_BF16, and
// gemm_f32.cpp for AVX-512.
struct GemmKernels {
  // Write the words of a block. A word is a pair (k, k + 1) of bf16, or one fp32 element. Zeros stand behind an odd
  // depth, and in the lanes that fill up the last group of 16.
  void (*pack_a)(const Block&, const Panels&);
  void (*pack_b)(const Block&, const Panels&);
  void (*tile)(const Tile&);
  void (*begin)();   // on each thread, before its first tile
  void (*end)();     // on each thread, after its last tile
  int64_t elements;  // of K in a word
  TileShape shape;
  const char* name;  // of the instructions
};
// The packed rows of a task fill half a level-2 cache of 1 MiB, beside 48 KiB of packed columns (Zen 4: 256 rows cost 3
// to 6 %, and 1024 gain nothing). The multiplications of a word cost 1/16 cycle, and packing a bf16 element half a
// cycle.
constexpr TileShape kVectorShape{kTileRows, kTileColumns, kTileRows, kTileColumns, kTileColumns, 1, 512, 16};

// The operands of the two matmuls of a backward pass, and their results: see gemm_rounding.cpp. A gradient that is not
// wanted is null.
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
// Elements of one row of dlogits, and what rounding took from them.
struct Kept {
  int count;
  int64_t column[40];
  float lost[40];
};
void add_rounding(const Rounding&);  // only where available

namespace avx512 {
GemmKernels gemm_f32_kernels();
}
namespace amx {
GemmKernels gemm_kernels();
}
namespace avx512_bf16 {
GemmKernels gemm_kernels();
// kept: one per row. The caller allocates it, because no template of the library may be compiled for AVX-512.
void add_rounding(const Rounding&, Kept* kept);
}  // namespace avx512_bf16
// The pointers are null where this machine, this build or RLKERNELS_CPU_ISA lacks the instructions.
GemmKernels gemm_kernels();
GemmKernels gemm_f32_kernels();

}  // namespace rlk
