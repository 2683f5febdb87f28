// Small operations on tiles that several stages share.
#pragma once

#include "gemm.h"
#include "sample.h"

namespace {

// Rows of queries or keys that a pass works on at a time: a multiple of kTileRows whose tiles stay in L2.
constexpr int64_t kBlock = NYSTROM_VECTOR_BYTES == 64 ? 98 : 96;

template <class A>
void fill(A* to, int64_t n, A x) {
  for (int64_t i = 0; i < n; ++i) to[i] = x;
}

template <class A>
void add(A* to, const A* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// to (columns, ld_to) = alpha from^T, with zeros beyond `rows`.
template <class A>
void transpose(const A* from, int64_t rows, int64_t columns, int64_t ld_from, A* to, int64_t ld_to, A alpha = A(1)) {
  for (int64_t x = 0; x < columns; ++x) {
    A* row = to + x * ld_to;
    for (int64_t j = 0; j < rows; ++j) row[j] = alpha * from[j * ld_from + x];
    for (int64_t j = rows; j < ld_to; ++j) row[j] = A(0);
  }
}

// Softmax over the first `columns` of each row; zeros up to ld.
template <class A>
void softmax_rows(A* s, int64_t rows, int64_t columns, int64_t ld) {
  constexpr int W = Simd<A>::width;
  for (int64_t i = 0; i < rows; ++i, s += ld) {
    for (int64_t j = columns; j < ld; ++j) s[j] = A(-__builtin_inf());
    Vec<A> high = load(s);
    for (int64_t j = W; j < ld; j += W) high = maximum(high, load(s + j));
    const Vec<A> top = broadcast(max<A>(high));
    Vec<A> total = {};
    for (int64_t j = 0; j < ld; j += W) {
      const Vec<A> e = exp<A>(load(s + j) - top);
      store(s + j, e);
      total += e;
    }
    const Vec<A> inverse = broadcast(A(1) / sum<A>(total));
    for (int64_t j = 0; j < ld; j += W) store(s + j, load(s + j) * inverse);
  }
}

// Row sums of a * b over ld elements.
template <class A>
inline A dot(const A* a, const A* b, int64_t ld) {
  Vec<A> total = {};
  for (int64_t j = 0; j < ld; j += Simd<A>::width) total += load(a + j) * load(b + j);
  return sum<A>(total);
}

}  // namespace
