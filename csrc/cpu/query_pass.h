// Stage `query_pass`: O = softmax(s Q Kt^T) W + conv(V), for all queries over m key landmarks (mathematics.md, section
// 2).
//
// All columns of a row are on chip, so the softmax is a plain one. Rows are independent: chunks only share out the
// work.
#pragma once

#include "convolution.h"
#include "window.h"

namespace {

template <class A>
struct QueryPassScratch {
  A *kt, *scores, *query, *out, *taps, *window;
  WindowScratch<A> near;
  QueryPassScratch() = default;
  QueryPassScratch(Arena& arena, const Problem& p) {
    const int64_t m = padded(p.columns());
    kt = arena.take<A>(p.head_dim * m);
    scores = arena.take<A>(kBlock * (m + band_width(p.window)));
    query = arena.take<A>(kBlock * p.head_width());
    out = arena.take<A>(kBlock * p.value_width());
    taps = arena.take<A>(p.taps);
    window = arena.take<A>(p.taps ? (kBlock + p.taps) * p.value_width() : 0);
    near = WindowScratch<A>(arena, p);
  }
};

// P1 of one block: softmax(s Q Kt^T), (queries, landmarks).
template <class A>
void query_pass_probabilities(const Problem& p, const Head& s, int64_t n, Tile<A> q, const A* kt, A* scores) {
  const int64_t m = padded(s.key_rows);
  gemm<false>(n, m, p.head_dim, q.data, q.ld, kt, m, scores, m);
  softmax_rows(scores, n, s.key_rows, m);
}

// The same with the columns of the window and the pinned tokens in the softmax.
template <class T>
void window_block(const Forward& f, const Head& s, const Dropout& dropout, int64_t first, int64_t n,
                  const QueryPassScratch<Acc<T>>& scratch, Place<Acc<T>> out) {
  using A = Acc<T>;
  const int64_t m = padded(s.columns()), ld = m + band_width(s.window), e = f.value_width();
  const Tile<A> q = query_rows<T>(f.query, s, f.head_dim).read(first, n, scratch.query);
  const Around<A> near = read_keys_around<T>(f, s, first, n, scratch.near);
  window_scores(f, s, first, n, q, near, scratch.kt, scratch.near, scratch.scores);
  softmax_rows(scratch.scores, n, ld, ld);
  if (dropout.on()) drop_window_rows(dropout, s, first, n, scratch.scores);
  gemm<false>(n, e, s.columns(), scratch.scores, ld, slice<A>(f.w, s.n, f.columns(), e), e, out.data, out.ld);
  for_each_band(s.window, n, [&](int64_t row, int64_t rows) {
    gemm<false>(rows, e, rows + 2 * s.window, scratch.scores + row * ld + m, ld, near.value.data + row * near.value.ld,
                near.value.ld, out.data + row * out.ld, out.ld, A(1), true);
  });
}

// One block of O before the convolution, by regime.
template <class T>
void query_block(const Forward& f, const Head& s, const Dropout& dropout, int64_t first, int64_t n,
                 const QueryPassScratch<Acc<T>>& scratch, Place<Acc<T>> out) {
  using A = Acc<T>;
  const int64_t width = f.value_width(), m = padded(s.key_rows);
  if (s.regime == Regime::empty) {
    for (int64_t i = 0; i < n; ++i) fill(out.data + i * out.ld, width, A(0));
  } else if (s.regime == Regime::exact_queries) {
    const A* u = slice<A>(f.u, s.n, f.queries.landmarks, width) + first * width;
    for (int64_t i = 0; i < n; ++i) std::memcpy(out.data + i * out.ld, u + i * width, size_t(width) * sizeof(A));
  } else if (s.extended) {
    window_block<T>(f, s, dropout, first, n, scratch, out);
  } else {
    const Tile<A> q = query_rows<T>(f.query, s, f.head_dim).read(first, n, scratch.query);
    query_pass_probabilities(f, s, n, q, scratch.kt, scratch.scores);
    if (dropout.on()) drop_rows(dropout, s, first, n, scratch.scores, m);
    gemm<false>(n, width, s.key_rows, scratch.scores, m, slice<A>(f.w, s.n, f.columns(), width), width, out.data,
                out.ld);
  }
}

// Task: (query chunk, head).
template <class T>
void query_pass(const Forward& f, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<QueryPassScratch<A>> scratch(static_cast<const Problem&>(f));
  const Slots slots = chunks(f.queries, f);
  const int64_t chunk = slots.size;
  for (int64_t task = begin; task < end; ++task) {
    const ChunkTask of(task, f.heads, slots);
    const Head s(f, of.problem);
    const int64_t from = of.chunk * chunk, to = s.queries < from + chunk ? s.queries : from + chunk;
    if (from >= to) continue;
    const Dropout dropout(f, s.n);
    transpose(slice<A>(f.kt, s.n, f.columns(), f.head_width()), s.columns(), f.head_dim, f.head_width(), scratch->kt,
              padded(s.columns()), A(f.scale));
    if (s.extended) scratch->near.prepare(s);
    const Rows<T> out = query_rows<T>(f.out, s, f.value_dim);
    const Convolution<T> conv{key_rows<T>(f.value, s, f.value_dim).by_position(),
                              f.keys.ignored ? f.keys.ignored + s.b * f.keys.length : nullptr,
                              f.keys.first ? s.keys : f.keys.length,
                              f.taps,
                              f.taps / 2,
                              scratch->taps,
                              scratch->window};
    if (f.taps) read_taps<T>(f, s.h, false, scratch->taps);
    for (int64_t i = from; i < to; i += kBlock) {
      const int64_t n = to - i < kBlock ? to - i : kBlock;
      const Place<A> o = out.place(i, n, scratch->out);
      query_block<T>(f, s, dropout, i, n, *scratch, o);
      if (f.taps) {
        for_each_run(s.query_index, i, n, [&](int64_t row, int64_t position, int64_t count) {
          conv.read(position, count);
          conv.accumulate(count, {o.data + row * o.ld, o.ld});
        });
      }
      out.write(i, n, o);
    }
  }
}

template <class A>
struct QueryPassBackwardScratch {
  A *kt, *wt, *scores, *dscores, *query, *dout, *dquery;
  WindowScratch<A> near;
  QueryPassBackwardScratch() = default;
  QueryPassBackwardScratch(Arena& arena, const Problem& p) {
    const int64_t m = padded(p.columns()), ld = m + band_width(p.window);
    kt = arena.take<A>(p.head_dim * m);
    wt = arena.take<A>(p.value_dim * m);
    scores = arena.take<A>(kBlock * ld);
    dscores = arena.take<A>(kBlock * ld);
    query = arena.take<A>(kBlock * p.head_width());
    dout = arena.take<A>(kBlock * p.value_width());
    dquery = arena.take<A>(kBlock * p.head_width());
    near = WindowScratch<A>(arena, p);
  }
};

// What a block adds to or writes; null: nobody asks for it.
template <class A>
struct QueryGradients {
  Place<A> dquery;
  A *dw, *dkt, *dmissed;
};

// One block: dW += P1^T dO, dKt += s dS1^T Q, dQ = s dS1 Kt, with dS1 = P1 * (dP1 - rowsum(P1 * dP1)), dP1 = D * (dO
// W^T), D: dropout. dQ still lacks the landmarks' share, which `landmarks_backward` adds.
template <class T>
void query_block_backward(const Backward& g, const Head& s, const Dropout& dropout, int64_t first, int64_t n,
                          const QueryPassBackwardScratch<Acc<T>>& scratch, const QueryGradients<Acc<T>>& to) {
  using A = Acc<T>;
  const int64_t m = padded(s.key_rows), d = g.head_width(), e = g.value_width();
  const Tile<A> q = query_rows<T>(g.query, s, g.head_dim).read(first, n, scratch.query);
  const Tile<A> dout = query_rows<T>(g.out, s, g.value_dim).read(first, n, scratch.dout);
  A *p = scratch.scores, *ds = scratch.dscores;
  query_pass_probabilities(g, s, n, q, scratch.kt, p);
  if (g.wanted.scores()) {
    gemm<false>(n, m, g.value_dim, dout.data, dout.ld, scratch.wt, m, ds, m);
    if (dropout.on()) drop_rows(dropout, s, first, n, ds, m);
    softmax_rows_backward(p, ds, n, m, A(g.scale));
  }
  if (to.dw) {
    if (dropout.on()) drop_rows(dropout, s, first, n, p, m);
    gemm<true>(s.key_rows, e, n, p, m, dout.data, dout.ld, to.dw, e, A(1), true);
  }
  if (to.dkt) gemm<true>(s.key_rows, d, n, ds, m, q.data, q.ld, to.dkt, d, A(1), true);
  if (to.dquery.data) {
    gemm<false>(n, d, s.key_rows, ds, m, slice<A>(g.kt, s.n, g.columns(), d), d, to.dquery.data, to.dquery.ld);
  }
}

// The same with the columns of the window and the pinned tokens: dS1 sums to dmissed over the landmarks, and LSE1 and
// delta1 = rowsum(P1 * dP1) are kept for the key pass, which gives each key its gradients as a column of the windows.
template <class T>
void window_block_backward(const Backward& g, const Head& s, const Dropout& dropout, int64_t first, int64_t n,
                           const QueryPassBackwardScratch<Acc<T>>& scratch, const QueryGradients<Acc<T>>& to) {
  using A = Acc<T>;
  const int64_t m = padded(s.columns()), ld = m + band_width(s.window), d = g.head_width(), e = g.value_width();
  const Tile<A> q = query_rows<T>(g.query, s, g.head_dim).read(first, n, scratch.query);
  const Tile<A> dout = query_rows<T>(g.out, s, g.value_dim).read(first, n, scratch.dout);
  const Around<A> near = read_keys_around<T>(g, s, first, n, scratch.near);
  A *p = scratch.scores, *ds = scratch.dscores;
  window_scores(g, s, first, n, q, near, scratch.kt, scratch.near, p);
  A *lse = scratch.near.lse, *delta = scratch.near.delta;
  softmax_rows<true>(p, n, ld, ld, lse);
  if (g.wanted.scores()) {
    gemm<false>(n, m, g.value_dim, dout.data, dout.ld, scratch.wt, m, ds, ld);
    window_products(s, n, g.value_dim, dout, near.value, A(1), scratch.near, ds + m, ld, false);
    if (dropout.on()) drop_window_rows(dropout, s, first, n, ds);
    softmax_rows_backward<true>(p, ds, n, ld, A(1), delta);
    sum_landmark_columns(s, first, n, ds, ld, to.dmissed);
  }
  if (dropout.on()) drop_window_rows(dropout, s, first, n, p);
  keep_row_statistics(g, s, first, n, lse, delta);

  const A scale = A(g.scale);
  gemm<true>(s.columns(), e, n, p, ld, dout.data, dout.ld, to.dw, e, A(1), true);
  if (to.dkt) gemm<true>(s.columns(), d, n, ds, ld, q.data, q.ld, to.dkt, d, scale, true);
  const Place<A> dq = to.dquery;
  if (!dq.data) return;
  gemm<false>(n, d, s.columns(), ds, ld, slice<A>(g.kt, s.n, g.columns(), d), d, dq.data, dq.ld, scale);
  for_each_band(s.window, n, [&](int64_t row, int64_t rows) {
    gemm<false>(rows, d, rows + 2 * s.window, ds + row * ld + m, ld, near.key.data + row * near.key.ld, near.key.ld,
                dq.data + row * dq.ld, dq.ld, scale, true);
  });
}

// Task: (query chunk, head). Partials of later chunks: a = dW, b = dKt, c = dmissed. The first chunk, even an empty
// one, writes what the others are added to.
template <class T>
void query_pass_backward(const Backward& g, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<QueryPassBackwardScratch<A>> scratch(static_cast<const Problem&>(g));
  const Slots slots = chunks(g.queries, g);
  const int64_t chunk = slots.size, rows = g.columns(), d = g.head_width(), e = g.value_width();
  for (int64_t task = begin; task < end; ++task) {
    const ChunkTask of(task, g.heads, slots);
    const Head s(g, of.problem);
    const int64_t from = of.chunk * chunk, to = s.queries < from + chunk ? s.queries : from + chunk;
    if (from >= to && of.chunk > 0) continue;
    const bool idle = s.regime == Regime::empty || s.regime == Regime::exact_queries;
    const Dropout dropout(g, s.n);
    const auto place = [&](void* result, void* later, int64_t size) {
      A* sums = partial<A>(result, later, s, g.heads, of.chunk, slots, size);
      fill(sums, size, A(0));
      return sums;
    };
    const int64_t segments = g.extended() && g.wanted.scores() ? g.queries.landmarks : 0;
    QueryGradients<A> sums{{},
                           needs_dw(g, s) ? place(g.dw, partials.a, rows * e) : nullptr,
                           g.wanted.key ? place(g.dkt, partials.b, rows * d) : nullptr,
                           place(g.dmissed, partials.c, segments)};
    const int64_t m = padded(s.columns());
    transpose(slice<A>(g.kt, s.n, rows, d), s.columns(), g.head_dim, d, scratch->kt, m, A(g.scale));
    if (g.wanted.scores()) transpose(slice<A>(g.w, s.n, rows, e), s.columns(), g.value_dim, e, scratch->wt, m);
    if (s.extended) scratch->near.prepare(s);
    const Rows<T> dquery = query_rows<T>(g.dquery, s, g.head_dim);
    for (int64_t i = from; i < to; i += kBlock) {
      const int64_t n = to - i < kBlock ? to - i : kBlock;
      if (g.wanted.query) sums.dquery = dquery.place(i, n, scratch->dquery);
      if (idle) {
        for (int64_t r = 0; g.wanted.query && r < n; ++r) fill(sums.dquery.data + r * sums.dquery.ld, d, A(0));
      } else if (s.extended) {
        window_block_backward<T>(g, s, dropout, i, n, *scratch, sums);
      } else {
        query_block_backward<T>(g, s, dropout, i, n, *scratch, sums);
      }
      if (g.wanted.query) dquery.write(i, n, sums.dquery);
    }
  }
}

// Task: problem. Adds the later chunks in order: dW, dKt, dmissed.
template <class T>
void query_pass_backward_merge(const Backward& g, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Slots slots = chunks(g.queries, g);
  const int64_t rows = g.columns(), segments = g.extended() && g.wanted.scores() ? g.queries.landmarks : 0;
  for (int64_t n = begin; n < end; ++n) {
    const Head s(g, n);
    const auto merge = [&](void* result, void* later, int64_t c, int64_t size) {
      add(slice<A>(result, n, size), partial<A>(nullptr, later, s, g.heads, c, slots, size), size);
    };
    for (int64_t c = 1; c * slots.size < s.queries; ++c) {
      if (needs_dw(g, s)) merge(g.dw, partials.a, c, rows * g.value_width());
      if (g.wanted.key) merge(g.dkt, partials.b, c, rows * g.head_width());
      merge(g.dmissed, partials.c, c, segments);
    }
  }
}

}  // namespace
