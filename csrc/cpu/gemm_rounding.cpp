// Gives back to a matmul what it loses by rounding the gradient of the logits to bf16, for the elements that hold
// nearly all of it.
//
// A row of that gradient sums to 0, so that the target's element is as large as all others together. At most 32 others
// reach 1/32 of it, and the squares of the rest are below 1/16 of its square. Rounding the row costs the gradients as
// much again as their own one rounding to bf16 (0.16 %). With these elements given back in fp32 it adds less than a
// twentieth of that. Compiled like gemm_bf16.cpp.
#include "gemm.h"
#include "mode.h"

#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace rlk::avx512_bf16 {
namespace {

// 33 elements for a gradient of log-probabilities, and a few more for what an entropy adds.
constexpr int kKept = sizeof(Kept::lost) / sizeof(float);
constexpr int64_t kScan = 64;
constexpr uint32_t kInfinity = 0x7f800000u;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float widened(uint16_t x) { return from_bits(uint32_t(x) << 16); }

float lost_by_rounding(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
  return x - from_bits(rounded);
}

// The bits of the largest magnitude, because magnitudes compare like their bits.
uint32_t largest(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = bits_of(x[i]) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  return most;
}

void find(const float* row, int64_t columns, Kept& kept) {
  kept.count = 0;
  const uint32_t most = largest(row, columns);
  if (most == 0 || most >= kInfinity) return;  // a row of zeros, or a row that is NaN already
  const uint32_t least = bits_of(from_bits(most) * (1.0f / 32.0f));
  for (int64_t start = 0; start < columns && kept.count < kKept; start += kScan) {
    const int64_t count = columns - start < kScan ? columns - start : kScan;
    if (largest(row + start, count) < least) continue;
    for (int64_t v = start; v < start + count && kept.count < kKept; ++v)
      if ((bits_of(row[v]) & 0x7fffffffu) >= least) {
        kept.column[kept.count] = v;
        kept.lost[kept.count++] = lost_by_rounding(row[v]);
      }
  }
}

void add(float* to, float factor, const uint16_t* x, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] += factor * widened(x[j]);
}

}  // namespace

void add_rounding(const Rounding& r, Kept* kept) {
  const auto mode = float_mode();
#pragma omp parallel num_threads(r.threads)
  {
    const FloatMode as_the_caller(mode);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < r.rows; ++t) {
      find(r.dlogits + t * r.dlogits_row, r.columns, kept[t]);
      if (!r.dhidden) continue;
      for (int k = 0; k < kept[t].count; ++k)
        add(r.dhidden + t * r.dhidden_row, kept[t].lost[k], r.weight + kept[t].column[k] * r.weight_row, r.width);
    }
    // Each thread owns some columns of dweight, because two rows may name the same token and their order must not
    // depend on threads.
    const int64_t slice = r.width ? (r.width + r.threads - 1) / r.threads : 1, width = r.dweight ? r.width : 0;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < width; j += slice) {
      const int64_t count = r.width - j < slice ? r.width - j : slice;
      for (int64_t t = 0; t < r.rows; ++t)
        for (int k = 0; k < kept[t].count; ++k)
          add(r.dweight + kept[t].column[k] * r.dweight_row + j, kept[t].lost[k], r.hidden + t * r.hidden_row + j,
              count);
    }
  }
}

}  // namespace rlk::avx512_bf16
