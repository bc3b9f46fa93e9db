// The words of a bf16 matmul, which are pairs of elements, because VDPBF16PS takes pairs.
#include "gemm_tile.h"

namespace rlk {
namespace avx512_bf16 {
namespace {

// Rounds fp32 to bf16, to nearest even, in the upper half of each word. The lower half is rubbish. VCVTNEPS2BF16 would
// not do, because it reads subnormal numbers as zero.
RLK_INLINE __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  // Adding to a NaN could carry out of its payload and make it a zero.
  return _mm512_mask_or_epi32(nearest, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}

struct Pairs {
  static constexpr int64_t elements = 2;

  RLK_INLINE __m512 add_product(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // 16 words of up to 32 neighbouring elements. Memory behind `count` is not touched.
  RLK_INLINE __m512i along(const Bf16* from, int64_t count) { return _mm512_maskz_loadu_epi16(first32(count), from); }
  RLK_INLINE __m512i along(const float* from, int64_t count) {
    const __m512i low = rounded(_mm512_maskz_loadu_ps(first16(count), from));
    const __m512i high = rounded(_mm512_maskz_loadu_ps(first16(count - 16), from + 16));
    const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                                  29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(low, upper_halves, high);
  }

  // 16 words of two rows of up to 16 neighbouring elements. The last row may stand alone.
  RLK_INLINE __m512i across(const Bf16* even, int64_t row, __mmask16 lanes, int64_t rows) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even));
    const __m512i high =
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > 1 ? lanes : 0, rows > 1 ? even + row : even));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  RLK_INLINE __m512i across(const float* even, int64_t row, __mmask16 lanes, int64_t rows) {
    const __m512i low = rounded(_mm512_maskz_loadu_ps(lanes, even));
    const __m512i high = rounded(_mm512_maskz_loadu_ps(rows > 1 ? lanes : 0, rows > 1 ? even + row : even));
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, _mm512_set1_epi32(int(0xffff0000u))));
  }

  template <class T>
  RLK_INLINE uint32_t one(T from, int64_t place) {
    Bf16 value;
    narrow(widen(from), &value);
    return uint32_t(value.bits) << 16 * place;
  }
};

void pack(const Block& x, const Panels& out) {
  x.wide ? pack_from<Pairs, float>(x, out) : pack_from<Pairs, Bf16>(x, out);
}
void tile(const Tile& t) { tile_any<Pairs>(t); }
void begin() {}
void end() { _mm_sfence(); }  // after the last streamed store

}  // namespace

GemmKernels gemm_kernels() { return {pack, pack, tile, begin, end, Pairs::elements, kVectorShape, "avx512_bf16"}; }

}  // namespace avx512_bf16
}  // namespace rlk
