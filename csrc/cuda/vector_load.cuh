// Loads, widens, masks and stores eight neighbouring columns of a row.
//
// A thread always takes eight columns that start at a multiple of eight, whatever the address of the row. They come by
// 16-byte accesses where those are possible, and one by one elsewhere. The bits of a row do not depend on its place in
// memory, because the columns of a thread do not. A row in bf16 is added up in the order of the same row in fp32.
#pragma once
#include "platform.cuh"
#include "arguments.h"

namespace rlk {

constexpr int kGroup = 8;

template <Dtype>
struct LogitsOf;
template <>
struct LogitsOf<Dtype::f32> {
  using type = float;
};
template <>
struct LogitsOf<Dtype::bf16> {
  using type = __nv_bfloat16;
};
template <>
struct LogitsOf<Dtype::f16> {
  using type = __half;
};

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

// Eight columns as they lie in memory: 16 bytes of a 16-bit dtype, 32 of fp32.
template <class T>
struct Packed {
  static constexpr int kWords = int(sizeof(T)) * kGroup / 16;
  uint4 word[kWords];
};

__device__ __forceinline__ void unpack(const Packed<float>& from, float (&x)[kGroup]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float4 v = bits_as<float4>(from.word[k]);
    x[4 * k] = v.x, x[4 * k + 1] = v.y, x[4 * k + 2] = v.z, x[4 * k + 3] = v.w;
  }
}

__device__ __forceinline__ void unpack_pair(unsigned pair, __nv_bfloat16, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void unpack_pair(unsigned pair, __half, float& low, float& high) {
  const float2 v = __half22float2(bits_as<__half2>(pair));
  low = v.x, high = v.y;
}
__device__ __forceinline__ unsigned pack_pair(__nv_bfloat16, float low, float high) {
  return bits_as<unsigned>(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ unsigned pack_pair(__half, float low, float high) {
  return bits_as<unsigned>(__floats2half2_rn(low, high));
}

template <class T>
__device__ __forceinline__ void unpack(const Packed<T>& from, float (&x)[kGroup]) {
  const unsigned w[4] = {from.word[0].x, from.word[0].y, from.word[0].z, from.word[0].w};
#pragma unroll
  for (int k = 0; k < 4; ++k) unpack_pair(w[k], T(), x[2 * k], x[2 * k + 1]);
}

// Rounds one column to the dtype that is stored.
__device__ __forceinline__ float rounded(float x, float) { return x; }
__device__ __forceinline__ __nv_bfloat16 rounded(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ __half rounded(float x, __half) { return __float2half_rn(x); }

// Rounds eight columns to the dtype that is stored.
__device__ __forceinline__ Packed<float> pack(const float (&x)[kGroup], float) {
  return {{bits_as<uint4>(make_float4(x[0], x[1], x[2], x[3])), bits_as<uint4>(make_float4(x[4], x[5], x[6], x[7]))}};
}
template <class T>
__device__ __forceinline__ Packed<T> pack(const float (&x)[kGroup], T) {
  return {{make_uint4(pack_pair(T(), x[0], x[1]), pack_pair(T(), x[2], x[3]), pack_pair(T(), x[4], x[5]),
                      pack_pair(T(), x[6], x[7]))}};
}

template <class T>
__device__ __forceinline__ bool aligned(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// kOnce: the columns need not stay in the caches, because no one reads them again soon.
template <bool kOnce, class T>
__device__ __forceinline__ Packed<T> load_whole(const T* at) {
  const uint4* from = reinterpret_cast<const uint4*>(at);
  Packed<T> to;
#pragma unroll
  for (int k = 0; k < Packed<T>::kWords; ++k) to.word[k] = kOnce ? __ldcs(from + k) : from[k];
  return to;
}

template <class T>
__device__ __forceinline__ void store_whole(T* at, const Packed<T>& from) {
  uint4* to = reinterpret_cast<uint4*>(at);
#pragma unroll
  for (int k = 0; k < Packed<T>::kWords; ++k) __stcs(to + k, from.word[k]);
}

// Loads eight columns. Those past the end are -inf, because they must weigh nothing.
template <bool kOnce, class T>
__device__ __forceinline__ Packed<T> load_group(const T* row, long long column, long long columns, bool wide) {
  if (wide && column + kGroup <= columns) return load_whole<kOnce>(row + column);
  T item[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) item[i] = column + i < columns ? row[column + i] : T(-INFINITY);
  Packed<T> to;
  memcpy(&to, item, sizeof to);
  return to;
}

template <class T>
__device__ __forceinline__ void store_group(T* row, long long column, long long columns, bool wide,
                                            const Packed<T>& from) {
  if (wide && column + kGroup <= columns) return store_whole(row + column, from);
  T item[kGroup];
  memcpy(item, &from, sizeof from);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (column + i < columns) row[column + i] = item[i];
}

// One bit per column, set where the column is inside the row and in the support.
__device__ __forceinline__ unsigned kept_columns(const unsigned char* mask, long long column, long long columns) {
  const long long left = columns - column;
  const unsigned inside = left >= kGroup ? 0xffu : left <= 0 ? 0u : (1u << left) - 1u;
  if (!mask || !inside) return inside;
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (inside >> i & 1) kept |= unsigned(mask[column + i] != 0) << i;
  return kept;
}

__device__ __forceinline__ void drop_columns(float (&x)[kGroup], unsigned kept) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] = kept >> i & 1 ? x[i] : -INFINITY;
}

// The logit of column y. It is NaN outside the row, where no address is formed, and -inf outside the support.
template <class T>
__device__ __forceinline__ float logit_of(const Rows& rows, const T* row, const unsigned char* mask, long long y) {
  if (!rows.holds(y)) return NAN;
  return mask && !mask[y] ? -INFINITY : as_float(row[y]);
}

// Writes zeros over columns [from, stop) of a row, by the `threads` threads of which this is number `rank`.
template <class T>
__device__ __forceinline__ void fill_zero(T* row, long long from, long long stop, long long columns, int rank,
                                          int threads) {
  const bool wide = aligned(row);
  const Packed<T> zero{};
  for (long long column = from + (long long)rank * kGroup; column < stop; column += (long long)threads * kGroup)
    store_group(row, column, columns, wide, zero);
}

// Reads and writes one number per row. An address of 0 is an input that is absent, or an output that is not wanted.
__device__ __forceinline__ float get(uintptr_t from, long long r) {
  return from ? pointer<const float>(from)[r] : 0.0f;
}
__device__ __forceinline__ void put(uintptr_t to, long long r, float x) {
  if (to) pointer<float>(to)[r] = x;
}

}  // namespace rlk
