// The gradient of a row, with recomputed exponentials and one rounding per stored element. A column's result depends on
// that column and on the statistics alone.
#pragma once
#include "blocks.h"
#include "rows.h"

namespace rlk {
namespace RLK_ISA {
namespace {

// The numbers of a GradientJob in every lane. kTerms holds kEntropy for the term of slope and kKl for that of cross.
struct Coefficients {
  Exponential exponential;
  Vec row_max, ref_row_max, flat, slope, cross;
};

template <unsigned kTerms, bool kStream, class X>
RLK_INLINE void gradient_chunk(X* out, const X* x, const X* r, const Coefficients& at) {
  Vec d[2 * kPairs], g[2 * kPairs];
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) {
    const Pair v = load_straight(x + k * kPair);
    d[2 * k] = at.exponential.bound(v.a - at.row_max), d[2 * k + 1] = at.exponential.bound(v.b - at.row_max);
  }
  at.exponential(d, g);
  if (kTerms & kKl) {
    RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) {
      const Pair ref = load_straight(r + k * kPair);
      const Vec rs[2] = {ref.a, ref.b};
      RLK_UNROLL_FOR (int i = 0; i < 2; ++i) {
        const Vec e = g[2 * k + i], u = d[2 * k + i],
                  rest = fma(at.slope, u, at.cross * (u - (rs[i] - at.ref_row_max)));
        g[2 * k + i] = fma(e, at.flat, e == 0.0f ? Vec{} : e * rest);
      }
    }
  } else if (kTerms & kEntropy) {
    RLK_UNROLL_FOR (int k = 0; k < 2 * kPairs; ++k) g[k] *= fma(at.slope, d[k], at.flat);
  }
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) store_straight<kStream>(out + k * kPair, {g[2 * k], g[2 * k + 1]});
}

template <unsigned kTerms, bool kStream, class X>
RLK_INLINE void gradient_block(X* out, const X* x, const X* r, int64_t n, const Coefficients& at) {
  const int64_t whole = n - n % kChunk;
  for (int64_t c = 0; c < whole; c += kChunk)
    gradient_chunk<kTerms, kStream>(out + c, x + c, kTerms & kKl ? r + c : r, at);
  if (whole == n) return;
  X x_rest[kChunk], r_rest[kChunk], out_rest[kChunk];
  padded(x_rest, x + whole, n - whole);
  if (kTerms & kKl) padded(r_rest, r + whole, n - whole);
  gradient_chunk<kTerms, false>(out_rest, x_rest, r_rest, at);
  for (int64_t c = whole; c < n; ++c) out[c] = out_rest[c - whole];
}

// Replaces a NaN with a payload by the canonical NaN, because round_to_bf16 assumes that.
RLK_INLINE double canonical(double x) { return x == x ? x : __builtin_nan(""); }

template <unsigned kTerms, class X>
RLK_INLINE Coefficients coefficients(const GradientJob& job) {
  const double flat = canonical(job.flat);
  // Where the flat term stands alone, its factor goes into the polynomial.
  return {Exponential::times(kTerms ? 1 : flat, job.temperature),
          all(float(job.row_max)),
          all(float(job.ref_row_max)),
          all(float(flat)),
          all(float(canonical(job.slope))),
          all(float(canonical(job.cross)))};
}

template <unsigned kTerms, class X>
void masked_gradient(const GradientJob& job) {
  const X *row = static_cast<const X*>(job.row), *ref = static_cast<const X*>(job.ref);
  X *out = static_cast<X*>(job.out), support[kBlock];
  const Coefficients at = coefficients<kTerms, X>(job);
  for (int64_t c = 0; c < job.columns; c += kBlock) {
    const int64_t n = job.columns - c < kBlock ? job.columns - c : kBlock;
    stage(support, row + c, job.mask + c, n);
    gradient_block<kTerms, false>(out + c, support, kTerms & kKl ? ref + c : ref, n, at);
    select(out + c, out + c, X{}, job.mask + c, n);  // 0 outside the support, also in a row whose statistics are NaN
  }
}

template <unsigned kTerms, class X>
void gradient_of(const GradientJob& job) {
  if (job.mask) return masked_gradient<kTerms, X>(job);
  const X *row = static_cast<const X*>(job.row), *ref = static_cast<const X*>(job.ref);
  X* out = static_cast<X*>(job.out);
  const Coefficients at = coefficients<kTerms, X>(job);
  if (!job.stream) return gradient_block<kTerms, false>(out, row, ref, job.columns, at);
  // A few columns are stored first, because a streaming store wants an aligned address. No bit depends on that.
  const int64_t odd = int64_t(-reinterpret_cast<uintptr_t>(out) % 64 / sizeof(X)),
                head = odd < job.columns ? odd : job.columns;
  if (head) gradient_block<kTerms, false>(out, row, ref, head, at);
  gradient_block<kTerms, true>(out + head, row + head, kTerms & kKl ? ref + head : ref, job.columns - head, at);
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class X>
void gradient(const GradientJob& job) {
  if (job.cross != 0) return gradient_of<kEntropy | kKl, X>(job);
  if (job.slope != 0) return gradient_of<kEntropy, X>(job);
  return gradient_of<0, X>(job);
}

}  // namespace
}  // namespace RLK_ISA
}  // namespace rlk
