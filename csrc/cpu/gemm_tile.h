// The parts of a matmul that depend on the instruction set, written once for words of a pair of bf16 and of one fp32.
// gemm_bf16.cpp, gemm_f32.cpp and gemm_amx.cpp include it, and each is compiled for its own instructions.
//
// A class `Words` says what a word holds. `elements` is the number of elements of K in a word. `along` makes 16 words
// of neighbouring elements, and `across` makes 16 words of neighbouring lanes. `one` is an element in its place in a
// word. `add_product` is the instruction.
#pragma once
#include <immintrin.h>

#include "../objective_functions.h"
#include "gemm.h"
#include "inline.h"

namespace rlk {
namespace {

// A mask of the low `count` lanes: none below 0, and all beyond 16.
RLK_INLINE __mmask16 first16(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1);
}

// A mask of the low `count` lanes: none below 0, and all beyond 32.
RLK_INLINE __mmask32 first32(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1; }

// Moves element (i, j) of 16 x 16 words to (j, i).
RLK_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  RLK_UNROLL_FOR (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  RLK_UNROLL_FOR (int i = 0; i < 16; i += 4) {
    RLK_UNROLL_FOR (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  }
  RLK_UNROLL_FOR (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88),
                  d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, c, 0x88), y[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), y[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  RLK_UNROLL_FOR (int i = 0; i < 16; ++i) x[i] = y[i];
}

RLK_INLINE void put(__m512i words, uint32_t* to, int64_t half) {
  if (half == kLanes / 2) return _mm512_storeu_si512(to, words);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(words));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half), _mm512_maskz_extracti64x4_epi64(0xf, words, 1));
}

// Packs lanes whose elements lie side by side.
template <class Words, class T>
RLK_INLINE void pack_along(const T* from, const Block& x, const Panels& out) {
  constexpr int64_t kTogether = kLanes * Words::elements;
  for (int64_t l = 0; l < x.lanes; l += kLanes)
    for (int64_t k = 0; k < x.depth; k += kTogether) {
      __m512i words[kLanes];
      RLK_UNROLL_FOR (int i = 0; i < kLanes; ++i) {
        const T* const at = from + (l + i) * x.lane + k;
        words[i] = l + i < x.lanes ? Words::along(at, x.depth - k) : _mm512_setzero_si512();
        // Two lines, because fp32 that becomes bf16 takes two.
        __builtin_prefetch(at + 2 * kTogether), __builtin_prefetch(at + 2 * kTogether + kTogether / 2);
      }
      transpose(words);
      uint32_t* const to = out.to + l / kLanes * out.group + k / Words::elements * out.step;
      const int64_t count = (x.depth - k + Words::elements - 1) / Words::elements;
      if (count >= kLanes) {
        RLK_UNROLL_FOR (int p = 0; p < kLanes; ++p) put(words[p], to + p * out.step, out.half);
      } else {
        for (int p = 0; p < count; ++p) put(words[p], to + p * out.step, out.half);
      }
    }
}

// Packs lanes that lie side by side. A few rows of memory are read at a time, each from end to end, because 16 columns
// of all 512 rows and then the next 16 took twice as long (fp32, 32000 columns, Zen 4). Prefetching the next rows saves
// another 11 %, and 27 % of bf16.
template <class Words, class T>
RLK_INLINE void pack_across(const T* from, const Block& x, const Panels& out) {
  constexpr int64_t kTogether = 8, kStep = Words::elements;
  for (int64_t begin = 0; begin < x.depth; begin += kTogether) {
    const int64_t end = begin + kTogether < x.depth ? begin + kTogether : x.depth;
    for (int64_t l = 0; l < x.lanes; l += kLanes) {
      const __mmask16 lanes = first16(x.lanes - l);
      uint32_t* const to = out.to + l / kLanes * out.group;
      for (int64_t k = begin; k < end; k += kStep) {
        const T* const at = from + l + k * x.along;
        RLK_UNROLL_FOR (int i = 0; i < kStep; ++i) __builtin_prefetch(at + (2 * kTogether + i) * x.along);
        put(Words::across(at, x.along, lanes, x.depth - k), to + k / kStep * out.step, out.half);
      }
    }
  }
}

template <class Words, class T>
RLK_INLINE void pack_any(const T* from, const Block& x, const Panels& out) {
  for (int64_t l = 0; l < x.lanes; l += kLanes)
    for (int64_t k = 0; k < x.depth; k += Words::elements) {
      uint32_t words[kLanes] = {};
      for (int64_t i = 0; i < kLanes && l + i < x.lanes; ++i)
        for (int64_t j = 0; j < Words::elements && k + j < x.depth; ++j)
          words[i] |= Words::one(from[(l + i) * x.lane + (k + j) * x.along], j);
      put(_mm512_loadu_si512(words), out.to + l / kLanes * out.group + k / Words::elements * out.step, out.half);
    }
}

template <class Words, class T>
RLK_INLINE void pack_from(const Block& x, const Panels& out) {
  const T* const from = reinterpret_cast<const T*>(x.address);
  if (x.along == 1) return pack_along<Words>(from, x, out);
  if (x.lane == 1) return pack_across<Words>(from, x, out);
  pack_any<Words>(from, x, out);
}

template <int kVectors>
RLK_INLINE void prefetch_out(const Tile& t) {
  if (!t.stream)
    for (int r = 0; r < t.rows; ++r)
      RLK_UNROLL_FOR (int v = 0; v < kVectors; ++v) __builtin_prefetch(t.out + r * t.out_row + v * kLanes, 1);
}

// Writes the sums of a slice to out, or adds them to it.
template <int kVectors>
RLK_INLINE void put_sums(const Tile& t, const float (*sums)[kVectors * kLanes]) {
  const __mmask16 last = first16(t.columns - (kVectors - 1) * kLanes);
  for (int r = 0; r < t.rows; ++r)
    RLK_UNROLL_FOR (int v = 0; v < kVectors; ++v) {
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

template <class Words, int kVectors>
RLK_INLINE void tile_of(const Tile& t) {
  prefetch_out<kVectors>(t);
  alignas(64) float sums[kTileRows][kVectors * kLanes];
  __m512 acc[kTileRows][kVectors];
  const uint32_t *a = t.a, *b = t.b;
  const int64_t words = (t.depth + Words::elements - 1) / Words::elements;
  for (int64_t begin = 0; begin < words; begin += kRun) {
    const int64_t end = begin + kRun < words ? begin + kRun : words;
    RLK_UNROLL_FOR (int r = 0; r < kTileRows; ++r)
      RLK_UNROLL_FOR (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_ps();
    for (int64_t p = begin; p < end; ++p) {
      __m512i row[kVectors];
      RLK_UNROLL_FOR (int v = 0; v < kVectors; ++v) row[v] = _mm512_load_si512(b + v * kLanes);
      RLK_UNROLL_FOR (int r = 0; r < kTileRows; ++r) {
        const __m512i word = _mm512_set1_epi32(int(a[r]));
        RLK_UNROLL_FOR (int v = 0; v < kVectors; ++v) acc[r][v] = Words::add_product(acc[r][v], word, row[v]);
      }
      a += kTileRows, b += kTileColumns;
    }
    if (begin > 0)
      RLK_UNROLL_FOR (int r = 0; r < kTileRows; ++r)
        RLK_UNROLL_FOR (int v = 0; v < kVectors; ++v)
          acc[r][v] = _mm512_add_ps(_mm512_load_ps(sums[r] + v * kLanes), acc[r][v]);
    RLK_UNROLL_FOR (int r = 0; r < kTileRows; ++r)
      RLK_UNROLL_FOR (int v = 0; v < kVectors; ++v) _mm512_store_ps(sums[r] + v * kLanes, acc[r][v]);
  }
  put_sums<kVectors>(t, sums);
}

template <class Words>
RLK_INLINE void tile_any(const Tile& t) {
  if (t.columns > 2 * kLanes) return tile_of<Words, 3>(t);
  if (t.columns > kLanes) return tile_of<Words, 2>(t);
  tile_of<Words, 1>(t);
}

}  // namespace
}  // namespace rlk
