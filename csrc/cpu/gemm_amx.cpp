// The bf16 matmul with the tile instructions of AMX. A tile register holds 16 rows of 64 bytes: 16 rows of a with 16
// pairs of K each, 16 pairs of K of 16 columns of b, or 16 x 16 sums. A tile of out is 2 x 2 registers of sums. So each
// register of a and of b that is loaded serves two multiplications, which take twice as long as to load it.
#include "gemm_tile.h"

namespace rlk {
namespace amx {
namespace {

constexpr int kTile = kLanes * kLanes;  // words in a tile register

// VCVTNE2PS2BF16 rounds to nearest even whatever MXCSR says, and reads subnormal numbers as zero. A subnormal that
// rounds up to 2^-126 is lost, as TDPBF16PS would lose all others.
RLK_INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Makes pairs of the elements of two rows: the even row in the lower half of x, and the odd one in its upper half.
RLK_INLINE __m512i paired(__m512i x) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, x);
}

struct Pairs {
  static constexpr int64_t elements = 2;

  RLK_INLINE __m512i along(const Bf16* from, int64_t count) { return _mm512_maskz_loadu_epi16(first32(count), from); }
  RLK_INLINE __m512i along(const float* from, int64_t count) {
    return rounded(_mm512_maskz_loadu_ps(first16(count), from), _mm512_maskz_loadu_ps(first16(count - 16), from + 16));
  }
  RLK_INLINE __m512i across(const Bf16* even, int64_t row, __mmask16 lanes, int64_t rows) {
    const __m256i low = _mm256_maskz_loadu_epi16(lanes, even);
    const __m256i high = _mm256_maskz_loadu_epi16(rows > 1 ? lanes : 0, rows > 1 ? even + row : even);
    return paired(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  RLK_INLINE __m512i across(const float* even, int64_t row, __mmask16 lanes, int64_t rows) {
    return paired(rounded(_mm512_maskz_loadu_ps(lanes, even),
                          _mm512_maskz_loadu_ps(rows > 1 ? lanes : 0, rows > 1 ? even + row : even)));
  }
  RLK_INLINE uint32_t one(Bf16 from, int64_t place) { return uint32_t(from.bits) << 16 * place; }
  RLK_INLINE uint32_t one(float from, int64_t place) {
    const __m512i bits = rounded(_mm512_set1_ps(from), _mm512_setzero_ps());
    return uint32_t(_mm_cvtsi128_si32(_mm512_castsi512_si128(bits)) & 0xffff) << 16 * place;
  }
};

int64_t words_of(int64_t depth) { return (depth + 1) / 2; }
int64_t whole_words(int64_t depth) { return (words_of(depth) + kLanes - 1) / kLanes * kLanes; }

// Every 16 pairs of K have a tile register's words for 16 lanes. Word p of lane l is the word 16 l + p of it. Each lane
// is read from end to end, and prefetched into the level-2 cache while the second one before it is read.
template <class T>
RLK_INLINE void pack_lane_by_lane(const Block& x, const Panels& out) {
  const int64_t lanes = (x.lanes + kLanes - 1) / kLanes * kLanes;
  for (int64_t l = 0; l < lanes; ++l) {
    const T* const from = reinterpret_cast<const T*>(x.address) + (l < x.lanes ? l : 0) * x.lane;
    uint32_t* const to = out.to + l / kLanes * out.group + l % kLanes * kLanes;
    for (int64_t k = 0; k < x.depth; k += 2 * kLanes) {
      RLK_UNROLL_FOR (int i = 0; i < int(sizeof(T)) / 2; ++i)
        __builtin_prefetch(from + 2 * x.lane + k + i * kLanes, 0, 2);
      _mm512_store_si512(to + k / 2 * kLanes,
                         l < x.lanes ? Pairs::along(from + k, x.depth - k) : _mm512_setzero_si512());
    }
  }
}

// The same words from lanes that lie side by side, or in any way: pair by pair, and then each tile transposed where it
// lies.
RLK_INLINE void pack_pair_by_pair(const Block& x, const Panels& out) {
  const Panels pairs{out.to, out.group, kLanes / 2, kLanes};
  x.wide ? pack_from<Pairs, float>(x, pairs) : pack_from<Pairs, Bf16>(x, pairs);
  for (int64_t l = 0; l < x.lanes; l += kLanes)
    for (int64_t p = 0; p < words_of(x.depth); p += kLanes) {
      uint32_t* const tile = out.to + l / kLanes * out.group + p * kLanes;
      __m512i words[kLanes];
      RLK_UNROLL_FOR (int i = 0; i < kLanes; ++i)
        words[i] = p + i < words_of(x.depth) ? _mm512_load_si512(tile + i * kLanes) : _mm512_setzero_si512();
      transpose(words);
      RLK_UNROLL_FOR (int i = 0; i < kLanes; ++i) _mm512_store_si512(tile + i * kLanes, words[i]);
    }
}

void pack_a(const Block& x, const Panels& out) {
  if (x.along != 1) return pack_pair_by_pair(x, out);
  x.wide ? pack_lane_by_lane<float>(x, out) : pack_lane_by_lane<Bf16>(x, out);
}

void pack_b(const Block& x, const Panels& out) {
  x.wide ? pack_from<Pairs, float>(x, out) : pack_from<Pairs, Bf16>(x, out);
  for (int64_t p = words_of(x.depth); p < whole_words(x.depth); ++p)
    for (int64_t l = 0; l < x.lanes; l += kLanes)
      _mm512_store_si512(out.to + l / kLanes * out.group + p * out.step, _mm512_setzero_si512());
}

constexpr int kColumns = 2 * kLanes;

// kDown x kAcross registers of sums: 0 to 3. Registers 4 and 5 hold a, and 6 and 7 hold b. The columns serve one tile
// after another, and a its rows one after another, so that a is loaded past the level-1 cache, which holds b: 22 % of
// the matmul of logits.
template <int kDown, int kAcross>
RLK_INLINE void tile_of(const Tile& t) {
  prefetch_out<kAcross>(t);
  constexpr int64_t kLine = kLanes * sizeof(uint32_t);
  alignas(64) float sums[kDown * kLanes][kAcross * kLanes];
  _tile_zero(0);
  if (kAcross > 1) _tile_zero(1);
  if (kDown > 1) _tile_zero(2);
  if (kDown > 1 && kAcross > 1) _tile_zero(3);
  const uint32_t *a = t.a, *b = t.b;
  for (int64_t p = 0; p < words_of(t.depth); p += kLanes) {
    _tile_loadd(6, b, kLine);
    _tile_stream_loadd(4, a, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if (kAcross > 1) {
      _tile_loadd(7, b + t.b_group, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kDown > 1) {
      _tile_stream_loadd(5, a + t.a_panel, kLine);
      _tile_dpbf16ps(2, 5, 6);
      if (kAcross > 1) _tile_dpbf16ps(3, 5, 7);
    }
    a += kTile, b += kTile;
  }
  constexpr int64_t kRow = sizeof(sums[0]);
  _tile_stored(0, sums[0], kRow);
  if (kAcross > 1) _tile_stored(1, sums[0] + kLanes, kRow);
  if (kDown > 1) _tile_stored(2, sums[(kDown - 1) * kLanes], kRow);
  if (kDown > 1 && kAcross > 1) _tile_stored(3, sums[(kDown - 1) * kLanes] + kLanes, kRow);
  put_sums<kAcross>(t, sums);
}

void tile(const Tile& t) {
  if (t.rows > kLanes) return t.columns > kLanes ? tile_of<2, 2>(t) : tile_of<2, 1>(t);
  t.columns > kLanes ? tile_of<1, 2>(t) : tile_of<1, 1>(t);
}

// The palette, and 16 rows of 64 bytes for each of the 8 registers. A constant, because the compiler takes
// _tile_loadconfig for a read of 8 bytes, and leaves out what a function would write behind them.
struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
alignas(64) constexpr Configuration kConfiguration{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&kConfiguration); }

// A thread whose tile registers are in use would have 8 KiB more to save whenever it is interrupted.
void end() {
  _tile_release();
  _mm_sfence();  // after the last streamed store
}

}  // namespace

// A task packs 512 rows, 512 KiB, beside 128 columns, 128 KiB. 256 rows cost 25 % on a level-2 cache of 2 MiB, and 1024
// gain nothing. 32 columns at a time cost 8 %, where they are read a line here and a line there.
constexpr TileShape kShape{2 * kLanes, kColumns, kLanes, kLanes, 128, kLanes, 512, 128};

GemmKernels gemm_kernels() { return {pack_a, pack_b, tile, begin, end, Pairs::elements, kShape, "amx"}; }

}  // namespace amx
}  // namespace rlk
