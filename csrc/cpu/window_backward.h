// The window, backward, for the keys: what each key gets as a column of the windows of the queries around it.
//
// The bands of window.h with the roles exchanged: row t is a key, column c the query of rank start - w + c, whose LSE1
// and delta1 the query pass left behind. Every key is written by one task.
#pragma once

#include "window.h"

namespace {

// LSE1 and delta1 of ranks first - w .. first + n + w - 1; queries that do not exist have P1 = exp(-infinity) = 0.
template <class A>
void read_row_statistics(const Backward& g, const Head& s, int64_t first, int64_t n, const WindowScratch<A>& scratch) {
  const A *lse = query_slice<A>(g.lse1, g, s), *delta = query_slice<A>(g.delta1, g, s);
  for (int64_t i = 0; i < around_width(s.window); ++i) {
    const int64_t rank = first - s.window + i;
    const bool exists = rank >= 0 && rank < s.queries && i < n + 2 * s.window;
    scratch.lse[i] = exists ? lse[rank] : A(__builtin_inf());
    scratch.delta[i] = exists && g.wanted.key ? delta[rank] : A(0);
  }
}

// 0 where the query in column c attends to the key in row t, -inf elsewhere: what is added to the scores.
template <class A>
void write_key_bias(const Head& s, int64_t start, int64_t rows, const WindowScratch<A>& scratch) {
  const int64_t width = band_width(s.window);
  for (int64_t t = 0; t < rows; ++t) {
    A* to = scratch.scores + t * width;
    for (int64_t c = 0; c < width; c += Simd<A>::width) store(to + c, load(scratch.pattern + t * width + c));
    if (start + t < s.pinned) fill(to, width, -A(__builtin_inf()));  // a column of its own in every row
  }
}

// The multipliers that drop_window_rows gave the same entries.
template <class A>
void drop_window_columns(const Dropout& dropout, const Head& s, int64_t start, int64_t rows, A* x) {
  const int64_t w = s.window, width = band_width(w);
  for (int64_t c = 0; c < rows + 2 * w; ++c) {
    const int64_t rank = start - w + c, low = c > 2 * w ? c - 2 * w : 0, high = c < rows ? c + 1 : rows;
    if (rank < 0 || rank >= s.queries) continue;
    dropout.apply(s.query_index ? s.query_index[rank] : rank, nullptr, s.columns() + 2 * w + low - c, high - low,
                  x + low * width + c, width);
  }
}

// P1 (D * P1 with dropout D) and, for dK, dS1 of one band of keys.
template <class A>
void window_band_backward(const Backward& g, const Head& s, const Dropout& dropout, int64_t start, int64_t rows,
                          Tile<A> k, Tile<A> v, const A* qt, const A* dot, const A* lse, const A* delta,
                          const WindowScratch<A>& scratch) {
  constexpr int W = Simd<A>::width;
  const int64_t width = band_width(s.window), around = around_width(s.window);
  A *p = scratch.scores, *ds = scratch.dscores;
  write_key_bias(s, start, rows, scratch);
  gemm<false>(rows, width, g.head_dim, k.data, k.ld, qt, around, p, width, A(g.scale), true);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < width; c += W) store(p + t * width + c, exp<A>(load(p + t * width + c) - load(lse + c)));
  }
  if (g.wanted.key) {
    gemm<false>(rows, width, g.value_dim, v.data, v.ld, dot, around, ds, width);
    if (dropout.on()) drop_window_columns(dropout, s, start, rows, ds);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = t * width; c < (t + 1) * width; c += W) {
        store(ds + c, load(p + c) * (load(ds + c) - load(delta + c - t * width)));
      }
    }
  }
  if (dropout.on() && g.wanted.value) drop_window_columns(dropout, s, start, rows, p);
}

// dV_j += sum_i D P1_ij dO_i and dK_j += s sum_i dS1_ij Q_i over the queries i whose window holds j.
template <class T>
void window_keys_backward(const Backward& g, const Head& s, int64_t first, int64_t n, Tile<Acc<T>> k, Tile<Acc<T>> v,
                          const WindowScratch<Acc<T>>& scratch, Acc<T>* dkey, Acc<T>* dvalue) {
  using A = Acc<T>;
  const int64_t w = s.window, width = band_width(w), around = around_width(w);
  const int64_t d = g.head_width(), e = g.value_width();
  const Dropout dropout(g, s.n);
  const Tile<A> q = read_around(query_rows<T>(g.query, s, g.head_dim), first, n, w, s.queries, scratch.key);
  const Tile<A> dout = read_around(query_rows<T>(g.out, s, g.value_dim), first, n, w, s.queries, scratch.value);
  transpose(q.data, n + 2 * w, g.head_dim, q.ld, scratch.transposed, around);
  if (g.wanted.key) transpose(dout.data, n + 2 * w, g.value_dim, dout.ld, scratch.transposed_value, around);
  read_row_statistics(g, s, first, n, scratch);
  for_each_band(w, n, [&](int64_t row, int64_t rows) {
    window_band_backward(g, s, dropout, first + row, rows, Tile<A>{k.data + row * k.ld, k.ld},
                         Tile<A>{v.data + row * v.ld, v.ld}, scratch.transposed + row, scratch.transposed_value + row,
                         scratch.lse + row, scratch.delta + row, scratch);
    if (g.wanted.value) {
      gemm<false>(rows, e, rows + 2 * w, scratch.scores, width, dout.data + row * dout.ld, dout.ld, dvalue + row * e, e,
                  A(1), true);
    }
    if (g.wanted.key) {
      gemm<false>(rows, d, rows + 2 * w, scratch.dscores, width, q.data + row * q.ld, q.ld, dkey + row * d, d,
                  A(g.scale), true);
    }
  });
}

}  // namespace
