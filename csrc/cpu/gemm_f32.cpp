// The words of an fp32 matmul, which are the elements themselves.
#include "gemm_tile.h"

namespace rlk {
namespace avx512 {
namespace {

struct Singles {
  static constexpr int64_t elements = 1;

  RLK_INLINE __m512 add_product(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  RLK_INLINE __m512i along(const float* from, int64_t count) { return _mm512_maskz_loadu_epi32(first16(count), from); }
  RLK_INLINE __m512i across(const float* from, int64_t, __mmask16 lanes, int64_t) {
    return _mm512_maskz_loadu_epi32(lanes, from);
  }
  RLK_INLINE uint32_t one(float from, int64_t) {
    uint32_t bits;
    __builtin_memcpy(&bits, &from, 4);
    return bits;
  }
};

void pack(const Block& x, const Panels& out) { pack_from<Singles, float>(x, out); }
void tile(const Tile& t) { tile_any<Singles>(t); }
void begin() {}
void end() { _mm_sfence(); }  // after the last streamed store

}  // namespace

GemmKernels gemm_f32_kernels() { return {pack, pack, tile, begin, end, Singles::elements, kVectorShape, "avx512"}; }

}  // namespace avx512
}  // namespace rlk
