// The parts of a bf16 matrix product that need AVX512_BF16. As in simd.h, everything is forced inline and nothing of the standard library
// is used: no template of this file may be linked into code for an older machine.
#include <immintrin.h>

#include "../scalar.h"
#include "gemm.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // _mm512_undefined_ps of GCC's own header
#endif

#define RLK_INLINE static inline __attribute__((always_inline))
#define RLK_UNROLL _Pragma("GCC unroll 16")

namespace rlk {
namespace avx512_bf16 {
namespace {

// The low `count` lanes, none below 0 and all beyond 16 or 32.
RLK_INLINE __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }
RLK_INLINE __mmask32 first32(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1; }

// fp32 to bf16 in the upper half of each word, to nearest even; the lower half is rubbish. Not VCVTNEPS2BF16: it reads subnormals as zero.
RLK_INLINE __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  // Adding to a NaN could carry out of its payload and make it a zero.
  return _mm512_mask_or_epi32(nearest, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}

// 16 words of pairs from up to 32 neighbouring elements; what lies behind `count` is not touched.
RLK_INLINE __m512i pairs_along(const Bf16* from, int64_t count) { return _mm512_maskz_loadu_epi16(first32(count), from); }
RLK_INLINE __m512i pairs_along(const float* from, int64_t count) {
  const __m512i low = rounded(_mm512_maskz_loadu_ps(first16(count), from));
  const __m512i high = rounded(_mm512_maskz_loadu_ps(first16(count - 16), from + 16));
  const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15,
                                                13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(low, upper_halves, high);
}

// 16 words of pairs from two rows of up to 16 neighbouring elements.
RLK_INLINE __m512i pairs_across(const Bf16* even, const Bf16* odd, __mmask16 lanes, __mmask16 odd_lanes) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_lanes, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
RLK_INLINE __m512i pairs_across(const float* even, const float* odd, __mmask16 lanes, __mmask16 odd_lanes) {
  const __m512i low = rounded(_mm512_maskz_loadu_ps(lanes, even)), high = rounded(_mm512_maskz_loadu_ps(odd_lanes, odd));
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, _mm512_set1_epi32(int(0xffff0000u))));
}

// Element (i, j) of 16 x 16 words goes to (j, i).
RLK_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  RLK_UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  RLK_UNROLL for (int i = 0; i < 16; i += 4) {
    RLK_UNROLL for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  }
  RLK_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, c, 0x88), y[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), y[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  RLK_UNROLL for (int i = 0; i < 16; ++i) x[i] = y[i];
}

RLK_INLINE void put(__m512i words, uint32_t* to, int64_t half) {
  if (half == kLanes / 2) return _mm512_storeu_si512(to, words);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(words));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half), _mm512_maskz_extracti64x4_epi64(0xf, words, 1));
}

// Lanes whose elements lie side by side.
template <class T>
RLK_INLINE void pack_along(const T* from, const Block& x, const Panels& out) {
  for (int64_t l = 0; l < x.lanes; l += kLanes)
    for (int64_t k = 0; k < x.depth; k += 32) {
      __m512i words[kLanes];
      RLK_UNROLL for (int i = 0; i < kLanes; ++i) {
        const T* const at = from + (l + i) * x.lane + k;
        words[i] = l + i < x.lanes ? pairs_along(at, x.depth - k) : _mm512_setzero_si512();
        __builtin_prefetch(at + 2 * 32), __builtin_prefetch(at + 2 * 32 + 16);  // one line of bf16, two of fp32
      }
      transpose(words);
      uint32_t* const to = out.to + l / kLanes * out.group + k / 2 * out.step;
      const int64_t pairs = (x.depth - k + 1) / 2;
      if (pairs >= 16) {
        RLK_UNROLL for (int p = 0; p < 16; ++p) put(words[p], to + p * out.step, out.half);
      } else {
        for (int p = 0; p < pairs; ++p) put(words[p], to + p * out.step, out.half);
      }
    }
}

// Lanes that lie side by side. A few rows of memory at a time, each read from end to end: 16 columns of all 512 rows, then the next 16,
// took twice as long (fp32, 32000 columns, Zen 4). The rows asked for ahead save another 11 %, of bf16 27 %.
template <class T>
RLK_INLINE void pack_across(const T* from, const Block& x, const Panels& out) {
  constexpr int64_t kTogether = 8;
  for (int64_t begin = 0; begin < x.depth; begin += kTogether) {
    const int64_t end = begin + kTogether < x.depth ? begin + kTogether : x.depth;
    for (int64_t l = 0; l < x.lanes; l += kLanes) {
      const __mmask16 lanes = first16(x.lanes - l);
      uint32_t* const to = out.to + l / kLanes * out.group;
      for (int64_t k = begin; k < end; k += 2) {
        const T* const even = from + l + k * x.along;
        const bool last = k + 1 == x.depth;
        __builtin_prefetch(even + 2 * kTogether * x.along), __builtin_prefetch(even + (2 * kTogether + 1) * x.along);
        put(pairs_across(even, last ? even : even + x.along, lanes, last ? 0 : lanes), to + k / 2 * out.step, out.half);
      }
    }
  }
}

template <class T>
RLK_INLINE void pack_any(const T* from, const Block& x, const Panels& out) {
  for (int64_t l = 0; l < x.lanes; l += kLanes)
    for (int64_t k = 0; k < x.depth; k += 2) {
      uint32_t words[kLanes] = {};
      for (int64_t i = 0; i < kLanes && l + i < x.lanes; ++i)
        for (int64_t j = 0; j < 2 && k + j < x.depth; ++j) {
          Bf16 value;
          narrow(widen(from[(l + i) * x.lane + (k + j) * x.along]), &value);
          words[i] |= uint32_t(value.bits) << 16 * j;
        }
      put(_mm512_loadu_si512(words), out.to + l / kLanes * out.group + k / 2 * out.step, out.half);
    }
}

template <class T>
RLK_INLINE void pack_from(const Block& x, const Panels& out) {
  const T* const from = reinterpret_cast<const T*>(x.address);
  if (x.along == 1) return pack_along(from, x, out);
  if (x.lane == 1) return pack_across(from, x, out);
  pack_any(from, x, out);
}

void pack(const Block& x, const Panels& out) { x.wide ? pack_from<float>(x, out) : pack_from<Bf16>(x, out); }

template <int kVectors>
RLK_INLINE void tile_of(const Tile& t) {
  const __mmask16 last = first16(t.columns - (kVectors - 1) * kLanes);
  if (!t.stream)
    for (int r = 0; r < t.rows; ++r)
      RLK_UNROLL for (int v = 0; v < kVectors; ++v) __builtin_prefetch(t.out + r * t.out_row + v * kLanes, 1);
  alignas(64) float sums[kTileRows][kVectors * kLanes];
  __m512 acc[kTileRows][kVectors];
  const uint32_t *a = t.a, *b = t.b;
  const int64_t pairs = (t.depth + 1) / 2;
  for (int64_t begin = 0; begin < pairs; begin += kRun / 2) {
    const int64_t end = begin + kRun / 2 < pairs ? begin + kRun / 2 : pairs;
    RLK_UNROLL for (int r = 0; r < kTileRows; ++r) RLK_UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_ps();
    for (int64_t p = begin; p < end; ++p) {
      __m512i row[kVectors];
      RLK_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = _mm512_load_si512(b + v * kLanes);
      RLK_UNROLL for (int r = 0; r < kTileRows; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a[r]));
        RLK_UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], pair, (__m512bh)row[v]);
      }
      a += kTileRows, b += kTileColumns;
    }
    if (begin > 0)
      RLK_UNROLL for (int r = 0; r < kTileRows; ++r) RLK_UNROLL for (int v = 0; v < kVectors; ++v)
        acc[r][v] = _mm512_add_ps(_mm512_load_ps(sums[r] + v * kLanes), acc[r][v]);
    RLK_UNROLL for (int r = 0; r < kTileRows; ++r) RLK_UNROLL for (int v = 0; v < kVectors; ++v)
      _mm512_store_ps(sums[r] + v * kLanes, acc[r][v]);
  }
  for (int r = 0; r < t.rows; ++r)
    RLK_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* const to = t.out + r * t.out_row + v * kLanes;
      const __mmask16 lanes = v + 1 < kVectors ? __mmask16(0xffff) : last;
      __m512 sum = _mm512_load_ps(sums[r] + v * kLanes);
      if (t.add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum);
      if (t.stream && lanes == 0xffff)
        _mm512_stream_ps(to, sum);
      else
        _mm512_mask_storeu_ps(to, lanes, sum);
    }
}

void tile(const Tile& t) {
  if (t.columns > 2 * kLanes) return tile_of<3>(t);
  if (t.columns > kLanes) return tile_of<2>(t);
  tile_of<1>(t);
}

void fence() { _mm_sfence(); }

}  // namespace

GemmKernels gemm_kernels() { return {pack, tile, fence}; }

}  // namespace avx512_bf16
}  // namespace rlk
