// The kernels over a row of a student and the row of its teacher, once the sums of both are known: what a mixture of
// the two distributions adds to a divergence, and the gradients that need both probabilities of a column.
#pragma once
#include "gradient.h"
#include "sums.h"

namespace rlk {
namespace RLK_ISA {
namespace {

// log x of positive normal numbers: x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh((m - 1) / (m + 1)).
// The first term left out of the series is below 1e-9 of the result.
RLK_INLINE Vec log_of(Vec x) {
  typedef int32_t Signed __attribute__((vector_size(4 * kLanes)));
  constexpr int32_t kRootOfHalf = 0x3f3504f3;
  const Signed bits = (Signed)x - kRootOfHalf;
  const Vec n = __builtin_convertvector(bits >> 23, Vec), m = (Vec)((bits & 0x7fffff) + kRootOfHalf);
  const Vec s = (m - all(1.0f)) / (m + all(1.0f)), t = s * s;
  Vec series = fma(t, all(1.0f / 9), all(1.0f / 7));
  series = fma(t, series, all(1.0f / 5));
  series = fma(t, series, all(1.0f / 3));
  series = fma(t * s, series, s);
  return fma(n, all(0x1.62e430p-1f), series + series);
}

// The numbers of a PairJob in every lane. p and q are exponentials times 1 / sum, the probabilities themselves.
struct PairCoefficients {
  Exponential p, q;
  Vec row_max, ref_row_max, inv_temperature, offset, beta, log_beta, scale, own;
};

RLK_INLINE PairCoefficients pair_coefficients(const PairJob& job, double p_factor, double q_factor) {
  return {Exponential::times(canonical(p_factor), job.temperature),
          Exponential::times(canonical(q_factor), job.temperature),
          all(float(job.row_max)),
          all(float(job.ref_row_max)),
          all(float(1 / job.temperature)),
          all(float(canonical(::log(job.sum_exp) - ::log(job.ref_sum_exp)))),
          all(float(job.beta)),
          all(float(job.beta > 0 ? ::log(job.beta) : 0)),
          all(float(canonical(job.scale))),
          all(float(canonical(job.own)))};
}

// u = log(M / p) with the mixture M = (1 - beta) p + beta q, exactly 0 where p = q. Where p is next to nothing, M is
// beta q, and no term with p counts: the division would overflow.
struct Mixed {
  Vec p, q, u, ratio;  // ratio = log(q / M)
};
RLK_INLINE Mixed mixed(const PairCoefficients& at, Vec p, Vec q, Vec d, Vec ref_d) {
  const auto nothing = p < 1e-30f;
  const Vec u = log_of(fma(at.beta, q / (nothing ? all(1.0f) : p) - all(1.0f), all(1.0f)));
  const Vec gap = fma(ref_d - d, at.inv_temperature, at.offset);  // log q - log p
  return {p, q, nothing ? Vec{} : u, nothing ? -at.log_beta : gap - u};
}

template <class X>
RLK_INLINE void add_mixture(Vec (&own)[2 * kPairs], Vec (&others)[2 * kPairs], const X* x, const X* r,
                            const PairCoefficients& at) {
  Vec d[2 * kPairs], ref_d[2 * kPairs], p[2 * kPairs], q[2 * kPairs];
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) {
    const Pair v = load(x + k * kPair), w = load(r + k * kPair);
    d[2 * k] = at.p.bound(v.a - at.row_max), d[2 * k + 1] = at.p.bound(v.b - at.row_max);
    ref_d[2 * k] = at.q.bound(w.a - at.ref_row_max), ref_d[2 * k + 1] = at.q.bound(w.b - at.ref_row_max);
  }
  at.p(d, p), at.q(ref_d, q);
  RLK_UNROLL_FOR (int k = 0; k < 2 * kPairs; ++k) {
    const Mixed m = mixed(at, p[k], q[k], d[k], ref_d[k]);
    own[k] -= p[k] * m.u;
    others[k] = fma(q[k], m.ratio, others[k]);
  }
}

template <class X>
void mixture_sums(const PairJob& job, double* own, double* others) {
  const X *row = static_cast<const X*>(job.row), *ref = static_cast<const X*>(job.ref);
  const PairCoefficients at = pair_coefficients(job, 1 / job.sum_exp, 1 / job.ref_sum_exp);
  Doubles own_sum{}, others_sum{};
  for (int64_t c = 0; c < job.columns; c += kBlock) {
    const int64_t n = job.columns - c < kBlock ? job.columns - c : kBlock, whole = n - n % kChunk;
    X support[kBlock], ref_support[kBlock];
    const X* x = job.mask ? stage(support, row + c, job.mask + c, n) : row + c;
    const X* r = job.mask ? stage(ref_support, ref + c, job.mask + c, n) : ref + c;
    Vec mine[2 * kPairs] = {}, theirs[2 * kPairs] = {};
    for (int64_t k = 0; k < whole; k += kChunk) add_mixture(mine, theirs, x + k, r + k, at);
    if (whole != n) {
      X x_rest[kChunk], r_rest[kChunk];
      add_mixture(mine, theirs, padded(x_rest, x + whole, n - whole), padded(r_rest, r + whole, n - whole), at);
    }
    fold(own_sum, mine), fold(others_sum, theirs);
  }
  *own = add_lanes(own_sum), *others = add_lanes(others_sum);
}

template <bool kMixture, bool kStream, class X>
RLK_INLINE void pair_chunk(X* out, const X* x, const X* r, const PairCoefficients& at) {
  Vec d[2 * kPairs], ref_d[2 * kPairs], p[2 * kPairs], q[2 * kPairs];
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) {
    const Pair v = load_straight(x + k * kPair), w = load_straight(r + k * kPair);
    d[2 * k] = at.p.bound(v.a - at.row_max), d[2 * k + 1] = at.p.bound(v.b - at.row_max);
    ref_d[2 * k] = at.q.bound(w.a - at.ref_row_max), ref_d[2 * k + 1] = at.q.bound(w.b - at.ref_row_max);
  }
  at.p(d, p), at.q(ref_d, q);
  RLK_UNROLL_FOR (int k = 0; k < 2 * kPairs; ++k)
    p[k] = kMixture ? at.scale * p[k] * (-mixed(at, p[k], q[k], d[k], ref_d[k]).u - at.own) : at.scale * (p[k] - q[k]);
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) store_straight<kStream>(out + k * kPair, {p[2 * k], p[2 * k + 1]});
}

template <bool kMixture, bool kStream, class X>
RLK_INLINE void pair_block(X* out, const X* x, const X* r, int64_t n, const PairCoefficients& at) {
  const int64_t whole = n - n % kChunk;
  for (int64_t c = 0; c < whole; c += kChunk) pair_chunk<kMixture, kStream>(out + c, x + c, r + c, at);
  if (whole == n) return;
  X x_rest[kChunk], r_rest[kChunk], out_rest[kChunk];
  padded(x_rest, x + whole, n - whole), padded(r_rest, r + whole, n - whole);
  pair_chunk<kMixture, false>(out_rest, x_rest, r_rest, at);
  for (int64_t c = whole; c < n; ++c) out[c] = out_rest[c - whole];
}

template <bool kMixture, class X>
void pair_gradient_of(const PairJob& job) {
  const X *row = static_cast<const X*>(job.row), *ref = static_cast<const X*>(job.ref);
  X* out = static_cast<X*>(job.out);
  const PairCoefficients at = pair_coefficients(job, 1 / job.sum_exp, 1 / job.ref_sum_exp);
  if (job.mask) {
    for (int64_t c = 0; c < job.columns; c += kBlock) {
      const int64_t n = job.columns - c < kBlock ? job.columns - c : kBlock;
      X support[kBlock], ref_support[kBlock];
      stage(support, row + c, job.mask + c, n), stage(ref_support, ref + c, job.mask + c, n);
      pair_block<kMixture, false>(out + c, support, ref_support, n, at);
      select(out + c, out + c, X{}, job.mask + c, n);  // 0 outside the support, also in a row whose sums are NaN
    }
    return;
  }
  if (!job.stream) return pair_block<kMixture, false>(out, row, ref, job.columns, at);
  const int64_t odd = int64_t(-reinterpret_cast<uintptr_t>(out) % 64 / sizeof(X)),
                head = odd < job.columns ? odd : job.columns;
  if (head) pair_block<kMixture, false>(out, row, ref, head, at);
  pair_block<kMixture, true>(out + head, row + head, ref + head, job.columns - head, at);
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class X>
void pair_gradient(const PairJob& job) {
  job.beta > 0 ? pair_gradient_of<true, X>(job) : pair_gradient_of<false, X>(job);
}

}  // namespace
}  // namespace RLK_ISA
}  // namespace rlk
