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

// R rows at a time: their reductions, each a chain of dependent shuffles, overlap.
template <int R, class A>
void softmax_rows_of(A* s, int64_t columns, int64_t ld) {
  constexpr int W = Simd<A>::width;
  Vec<A> top[R], total[R] = {};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int64_t j = columns; j < ld; ++j) s[r * ld + j] = A(-__builtin_inf());
    top[r] = load(s + r * ld);
  }
  for (int64_t j = W; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) top[r] = maximum(top[r], load(s + r * ld + j));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) top[r] = broadcast(max<A>(top[r]));
  for (int64_t j = 0; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> e = exp<A>(load(s + r * ld + j) - top[r]);
      store(s + r * ld + j, e);
      total[r] += e;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r] = broadcast(A(1) / sum<A>(total[r]));
  for (int64_t j = 0; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(s + r * ld + j, load(s + r * ld + j) * total[r]);
  }
}

// Softmax over the first `columns` of each row; zeros up to ld.
template <class A>
void softmax_rows(A* s, int64_t rows, int64_t columns, int64_t ld) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) softmax_rows_of<4>(s + i * ld, columns, ld);
  for (; i < rows; ++i) softmax_rows_of<1>(s + i * ld, columns, ld);
}

// Row sums of a * b over ld elements.
template <class A>
inline A dot(const A* a, const A* b, int64_t ld) {
  Vec<A> total = {};
  for (int64_t j = 0; j < ld; j += Simd<A>::width) total += load(a + j) * load(b + j);
  return sum<A>(total);
}

// Backward of a row softmax, R rows: dp becomes scale p (dp - rowsum(p dp)).
template <int R, class A>
void softmax_rows_backward_of(const A* p, A* dp, int64_t ld, A scale) {
  constexpr int W = Simd<A>::width;
  Vec<A> delta[R] = {};
  for (int64_t j = 0; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) delta[r] += load(p + r * ld + j) * load(dp + r * ld + j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) delta[r] = broadcast(sum<A>(delta[r]));
  for (int64_t j = 0; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(dp + r * ld + j, scale * load(p + r * ld + j) * (load(dp + r * ld + j) - delta[r]));
    }
  }
}

template <class A>
void softmax_rows_backward(const A* p, A* dp, int64_t rows, int64_t ld, A scale) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) softmax_rows_backward_of<4>(p + i * ld, dp + i * ld, ld, scale);
  for (; i < rows; ++i) softmax_rows_backward_of<1>(p + i * ld, dp + i * ld, ld, scale);
}

}  // namespace
