// Vectors of the instruction set this file is compiled for: GCC/Clang vector extensions, no intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef NYSTROM_VECTOR_BYTES
#define NYSTROM_VECTOR_BYTES 16
#endif

namespace {  // each instruction set has its own copy; nothing here may be shared by the linker

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using integer = int32_t;
};
template <>
struct Lanes<double> {
  using integer = int64_t;
};

template <class A>
struct Simd {
  static constexpr int width = NYSTROM_VECTOR_BYTES / sizeof(A);
  using integer = typename Lanes<A>::integer;
  typedef A vec __attribute__((vector_size(NYSTROM_VECTOR_BYTES)));
  typedef integer ivec __attribute__((vector_size(NYSTROM_VECTOR_BYTES)));
  typedef A unaligned __attribute__((vector_size(NYSTROM_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vec = typename Simd<A>::vec;

template <class A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::unaligned*>(p);
}
template <class A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Simd<A>::unaligned*>(p) = v;
}
template <class A>
inline Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

template <class V>
inline V maximum(V a, V b) {
  return a < b ? b : a;  // a NaN in `a` stays; one in `b` is lost, and shows again in exp(b - max)
}

// Lane i of the result: lane lane[i] of a followed by b.
template <class A>
inline Vec<A> shuffle(Vec<A> a, Vec<A> b, typename Simd<A>::ivec lane) {
#if defined(__clang__)
  constexpr int W = Simd<A>::width;
  Vec<A> to;
  for (int i = 0; i < W; ++i) to[i] = lane[i] < W ? a[lane[i]] : b[lane[i] - W];
  return to;
#else
  return __builtin_shuffle(a, b, lane);
#endif
}

// Reduction over the lanes by halves: a fixed order.
template <class A, class Op>
inline A reduce(Vec<A> v, Op op) {
  constexpr int width = Simd<A>::width;
#pragma GCC unroll 4
  for (int half = width / 2; half > 0; half /= 2) {
    typename Simd<A>::ivec lane;
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) lane[i] = (i + half) % width;
    v = op(v, shuffle<A>(v, v, lane));
  }
  return v[0];
}
template <class A>
inline A sum(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> a, Vec<A> b) { return a + b; });
}
template <class A>
inline A max(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> a, Vec<A> b) { return maximum(a, b); });
}

// Of each pair of rows whose numbers differ in `bit`: first the lanes `low` of the two, then the lanes `high`.
template <class A>
inline void shuffle_rows(Vec<A>* r, int bit, typename Simd<A>::ivec low, typename Simd<A>::ivec high) {
#pragma GCC unroll 16
  for (int i = 0; i < Simd<A>::width; ++i) {
    if (i & bit) continue;
    const Vec<A> a = r[i], b = r[i | bit];
    r[i] = shuffle<A>(a, b, low);
    r[i | bit] = shuffle<A>(a, b, high);
  }
}

// The transpose of the square whose rows are r: each step trades a bit of the row's number for one of the column's.
// Steps stay within 16 bytes or move these as a whole; shuffles that do neither are slower.
template <class A>
inline void transpose_square(Vec<A>* r) {
  constexpr int W = Simd<A>::width, L = 16 / sizeof(A);
  typename Simd<A>::ivec low;
  if constexpr (L == 4) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) low[i] = i / L * L + i % L / 2 + i % 2 * W;
    shuffle_rows<A>(r, 1, low, low + 2);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) low[i] = i / L * L + i % (L / 2) + i % L / (L / 2) * W;
  shuffle_rows<A>(r, L / 2, low, low + L / 2);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) low[i] = i / L * 2 * L + i % L;
#pragma GCC unroll 2
  for (int bit = L; bit < W; bit *= 2) shuffle_rows<A>(r, bit, low, low + L);
  if constexpr (L == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < W; i += L) {  // the first step has traded the bits crosswise
      const Vec<A> row = r[i + 1];
      r[i + 1] = r[i + 2];
      r[i + 2] = row;
    }
  }
}

// exp for x <= about 1 (scores minus their maximum or logsumexp). Cody-Waite reduction, then a Taylor polynomial on
// |r| <= log(2)/2: degree 7 leaves 1e-8 in float, degree 13 leaves 4e-18 in double. Results that would be subnormal are
// 0, so exp(-inf) = 0; NaN stays NaN.
template <class A>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float log2e = 1.44269504088896341f, high = 0.693359375f, low = -2.12194440e-4f;
  static constexpr float magic = 12582912.0f, lowest = -87.3f;  // magic = 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};
template <>
struct Exp<double> {
  static constexpr double log2e = 1.44269504088896340736, high = 6.93147180369123816490e-01,
                          low = 1.90821492927058770002e-10;
  static constexpr double magic = 6755399441055744.0, lowest = -708.3;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
};
template <class A>
constexpr A reciprocal_factorial(int n) {
  A f = 1;
  for (int i = 2; i <= n; ++i) f *= i;
  return A(1) / f;
}
template <class A>
inline Vec<A> exp(Vec<A> x) {
  using E = Exp<A>;
  using I = typename Simd<A>::ivec;
  const Vec<A> shifted = x * E::log2e + E::magic;
  const Vec<A> n = shifted - E::magic;
  const Vec<A> r = (x - n * E::high) - n * E::low;
  Vec<A> p = broadcast<A>(reciprocal_factorial<A>(E::degree));
#pragma GCC unroll 16
  for (int k = E::degree - 1; k >= 0; --k) p = p * r + reciprocal_factorial<A>(k);
  const I power = ((I)shifted + (typename Simd<A>::integer)E::bias) << E::mantissa;  // low bits of shifted hold n
  return x < E::lowest ? Vec<A>{} : p * (Vec<A>)power;
}

}  // namespace
