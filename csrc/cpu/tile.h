// Small operations on tiles that several stages share.
#pragma once

#include "gemm.h"
#include "sample.h"

namespace {

template <class A>
void fill(A* to, int64_t n, A x) {
  for (int64_t i = 0; i < n; ++i) to[i] = x;
}

template <class A>
void add(A* to, const A* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// to (width) = the sum of `rows` rows, in order; sums stay in registers, of C vectors at a time.
template <int C, class A>
inline void sum_rows_of(const A* x, int64_t rows, int64_t ld, A* to) {
  constexpr int W = Simd<A>::width;
  Vec<A> total[C] = {};
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) total[j] += load(x + i * ld + j * W);
  }
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) store(to + j * W, total[j]);
}
template <class A>
void sum_rows(const A* x, int64_t rows, int64_t ld, A* to, int64_t width) {
  constexpr int W = Simd<A>::width;
  int64_t j = 0;
  for (; j + 4 * W <= width; j += 4 * W) sum_rows_of<4>(x + j, rows, ld, to + j);
  for (; j < width; j += W) sum_rows_of<1>(x + j, rows, ld, to + j);
}

// to (columns, ld_to) = alpha from^T, with zeros beyond `rows`: squares of one vector a side, and the columns left
// over.
template <class A>
void transpose(const A* from, int64_t rows, int64_t columns, int64_t ld_from, A* to, int64_t ld_to, A alpha = A(1)) {
  constexpr int W = Simd<A>::width;
  int64_t x = 0;
  for (; x + W <= columns; x += W) {
    for (int64_t j = 0; j < ld_to; j += W) {
      Vec<A> square[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        __builtin_prefetch(from + (j + i + kBlock) * ld_from + x);  // for the next block of tokens
        square[i] = j + i < rows ? alpha * load(from + (j + i) * ld_from + x) : Vec<A>{};
      }
      transpose_square<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (x + i) * ld_to + j, square[i]);
    }
  }
  for (; x < columns; ++x) {
    A* row = to + x * ld_to;
    for (int64_t j = 0; j < rows; ++j) row[j] = alpha * from[j * ld_from + x];
    for (int64_t j = rows; j < ld_to; ++j) row[j] = A(0);
  }
}

// The logarithm of a number of tokens.
template <class A>
inline A log_count(int64_t n) {
  return A(__builtin_log(double(n)));
}

template <class A>
inline A log(A x) {
  if constexpr (sizeof(A) == 4) return __builtin_logf(x);
  return __builtin_log(x);
}

// R rows at a time: their reductions, each a chain of dependent shuffles, overlap. lse: the rows' logsumexp, if `Keep`.
template <int R, bool Keep, class A>
void softmax_rows_of(A* s, int64_t columns, int64_t ld, A* lse) {
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
  for (int r = 0; r < R; ++r) {
    const A all = sum<A>(total[r]);
    if constexpr (Keep) lse[r] = top[r][0] + log(all);
    total[r] = broadcast(A(1) / all);
  }
  for (int64_t j = 0; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(s + r * ld + j, load(s + r * ld + j) * total[r]);
  }
}

// Softmax over the first `columns` of each row; zeros up to ld.
template <bool Keep = false, class A>
void softmax_rows(A* s, int64_t rows, int64_t columns, int64_t ld, A* lse = nullptr) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) softmax_rows_of<4, Keep>(s + i * ld, columns, ld, Keep ? lse + i : nullptr);
  for (; i < rows; ++i) softmax_rows_of<1, Keep>(s + i * ld, columns, ld, Keep ? lse + i : nullptr);
}

// Row sums of a * b over ld elements.
template <class A>
inline A dot(const A* a, const A* b, int64_t ld) {
  Vec<A> total = {};
  for (int64_t j = 0; j < ld; j += Simd<A>::width) total += load(a + j) * load(b + j);
  return sum<A>(total);
}

// Backward of a row softmax, R rows: dp becomes scale p (dp - rowsum(p dp)). sums: those row sums, if `Keep`.
template <int R, bool Keep, class A>
void softmax_rows_backward_of(const A* p, A* dp, int64_t ld, A scale, A* sums) {
  constexpr int W = Simd<A>::width;
  Vec<A> delta[R] = {};
  for (int64_t j = 0; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) delta[r] += load(p + r * ld + j) * load(dp + r * ld + j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    delta[r] = broadcast(sum<A>(delta[r]));
    if constexpr (Keep) sums[r] = delta[r][0];
  }
  for (int64_t j = 0; j < ld; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(dp + r * ld + j, scale * load(p + r * ld + j) * (load(dp + r * ld + j) - delta[r]));
    }
  }
}

template <bool Keep = false, class A>
void softmax_rows_backward(const A* p, A* dp, int64_t rows, int64_t ld, A scale, A* sums = nullptr) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    softmax_rows_backward_of<4, Keep>(p + i * ld, dp + i * ld, ld, scale, Keep ? sums + i : nullptr);
  for (; i < rows; ++i)
    softmax_rows_backward_of<1, Keep>(p + i * ld, dp + i * ld, ld, scale, Keep ? sums + i : nullptr);
}

}  // namespace
