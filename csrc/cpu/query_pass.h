// Stage `query_pass`: O = softmax(s Q Kt^T) W + conv(V), for all queries over m key landmarks (mathematics.md, section
// 2).
//
// All columns of a row are on chip, so the softmax is a plain one. Rows are independent: chunks only share out the
// work.
#pragma once

#include "convolution.h"
#include "philox.h"

namespace {

template <class A>
struct QueryPassScratch {
  A *kt, *scores, *query, *out, *taps, *window;
  QueryPassScratch() = default;
  QueryPassScratch(Arena& arena, const Problem& p) {
    const int64_t m = padded(p.keys.landmarks);
    kt = arena.take<A>(p.head_dim * m);
    scores = arena.take<A>(kBlock * m);
    query = arena.take<A>(kBlock * p.head_width());
    out = arena.take<A>(kBlock * p.value_width());
    taps = arena.take<A>(p.taps);
    window = arena.take<A>(p.taps ? (kBlock + p.taps) * p.value_width() : 0);
  }
};

// P1 of one block: softmax(s Q Kt^T), (queries, landmarks).
template <class A>
void query_pass_probabilities(const Problem& p, const Head& s, int64_t n, Tile<A> q, const A* kt, A* scores) {
  const int64_t m = padded(s.key_rows);
  gemm<false>(n, m, p.head_dim, q.data, q.ld, kt, m, scores, m);
  softmax_rows(scores, n, s.key_rows, m);
}

template <class A>
void drop_rows(const Dropout& dropout, const Head& s, int64_t first, int64_t n, A* x, int64_t ld) {
  for (int64_t i = 0; i < n; ++i) {
    dropout.apply(s.query_index ? s.query_index[first + i] : first + i, x + i * ld, s.key_rows);
  }
}

// One block of O before the convolution, by regime.
template <class T>
void query_block(const Forward& f, const Head& s, const Dropout& dropout, int64_t first, int64_t n,
                 const QueryPassScratch<Acc<T>>& scratch) {
  using A = Acc<T>;
  const int64_t width = f.value_width(), m = padded(s.key_rows);
  if (s.regime == Regime::empty) {
    fill(scratch.out, n * width, A(0));
  } else if (s.regime == Regime::exact_queries) {
    const A* u = slice<A>(f.u, s.n, f.queries.landmarks, width);
    std::memcpy(scratch.out, u + first * width, size_t(n * width) * sizeof(A));
  } else {
    const Tile<A> q = query_rows<T>(f.query, s, f.head_dim).read(first, n, scratch.query);
    query_pass_probabilities(f, s, n, q, scratch.kt, scratch.scores);
    if (dropout.on()) drop_rows(dropout, s, first, n, scratch.scores, m);
    gemm<false>(n, width, s.key_rows, scratch.scores, m, slice<A>(f.w, s.n, f.keys.landmarks, width), width,
                scratch.out, width);
  }
}

// Task: (problem, query chunk).
template <class T>
void query_pass(const Forward& f, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<QueryPassScratch<A>> scratch(static_cast<const Problem&>(f));
  const int64_t n_chunks = chunks(f.queries, f.landmarks), chunk = chunk_length(f.landmarks), width = f.value_width();
  for (int64_t task = begin; task < end; ++task) {
    const Head s(f, task / n_chunks);
    const int64_t from = task % n_chunks * chunk, to = s.queries < from + chunk ? s.queries : from + chunk;
    if (from >= to) continue;
    const Dropout dropout(f, s.n);
    transpose(slice<A>(f.kt, s.n, f.keys.landmarks, f.head_width()), s.key_rows, f.head_dim, f.head_width(),
              scratch->kt, padded(s.key_rows), A(f.scale));
    const Rows<T> out = query_rows<T>(f.out, s, f.value_dim);
    const Convolution<T> conv{rows<T>(f.value, s.b, s.kv, f.value_dim, nullptr),
                              f.keys.ignored ? f.keys.ignored + s.b * f.keys.length : nullptr,
                              f.keys.length,
                              f.taps,
                              f.taps / 2,
                              scratch->taps,
                              scratch->window};
    if (f.taps) read_taps<T>(f, s.h, false, scratch->taps);
    for (int64_t i = from; i < to; i += kBlock) {
      const int64_t n = to - i < kBlock ? to - i : kBlock;
      query_block<T>(f, s, dropout, i, n, *scratch);
      if (f.taps) {
        for_each_run(s.query_index, i, n, [&](int64_t row, int64_t position, int64_t count) {
          conv.read(position, count);
          conv.accumulate(count, scratch->out + row * width);
        });
      }
      out.write(i, n, scratch->out);
    }
  }
}

template <class A>
struct QueryPassBackwardScratch {
  A *kt, *wt, *scores, *dscores, *query, *dout, *dquery;
  QueryPassBackwardScratch() = default;
  QueryPassBackwardScratch(Arena& arena, const Problem& p) {
    const int64_t m = padded(p.keys.landmarks);
    kt = arena.take<A>(p.head_dim * m);
    wt = arena.take<A>(p.value_dim * m);
    scores = arena.take<A>(kBlock * m);
    dscores = arena.take<A>(kBlock * m);
    query = arena.take<A>(kBlock * p.head_width());
    dout = arena.take<A>(kBlock * p.value_width());
    dquery = arena.take<A>(kBlock * p.head_width());
  }
};

// One block: dW += P1^T dO, dKt += s dS1^T Q, dQ = s dS1 Kt, with dS1 = P1 * (dP1 - rowsum(P1 * dP1)), dP1 = D * (dO
// W^T), D: dropout. dQ still lacks the landmarks' share, which `landmarks_backward` adds.
template <class T>
void query_block_backward(const Backward& g, const Head& s, const Dropout& dropout, int64_t first, int64_t n,
                          const QueryPassBackwardScratch<Acc<T>>& scratch, Acc<T>* dw, Acc<T>* dkt) {
  using A = Acc<T>;
  const int64_t m = padded(s.key_rows), d = g.head_width(), e = g.value_width();
  const Tile<A> q = query_rows<T>(g.query, s, g.head_dim).read(first, n, scratch.query);
  const Tile<A> dout = query_rows<T>(g.out, s, g.value_dim).read(first, n, scratch.dout);
  A *p = scratch.scores, *ds = scratch.dscores;
  query_pass_probabilities(g, s, n, q, scratch.kt, p);
  gemm<false>(n, m, g.value_dim, dout.data, dout.ld, scratch.wt, m, ds, m);
  if (dropout.on()) drop_rows(dropout, s, first, n, ds, m);
  softmax_rows_backward(p, ds, n, m, A(g.scale));
  if (dropout.on()) drop_rows(dropout, s, first, n, p, m);
  gemm<true>(s.key_rows, e, n, p, m, dout.data, dout.ld, dw, e, A(1), true);
  gemm<true>(s.key_rows, d, n, ds, m, q.data, q.ld, dkt, d, A(1), true);
  gemm<false>(n, d, s.key_rows, ds, m, slice<A>(g.kt, s.n, g.keys.landmarks, d), d, scratch.dquery, d);
}

// Task: (problem, query chunk). Partials: a = dW, b = dKt.
template <class T>
void query_pass_backward(const Backward& g, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<QueryPassBackwardScratch<A>> scratch(static_cast<const Problem&>(g));
  const int64_t n_chunks = chunks(g.queries, g.landmarks), chunk = chunk_length(g.landmarks);
  const int64_t rows = g.keys.landmarks, d = g.head_width(), e = g.value_width();
  for (int64_t task = begin; task < end; ++task) {
    const Head s(g, task / n_chunks);
    const int64_t from = task % n_chunks * chunk, to = s.queries < from + chunk ? s.queries : from + chunk;
    if (from >= to) continue;
    const bool idle = s.regime == Regime::empty || s.regime == Regime::exact_queries;
    const Dropout dropout(g, s.n);
    A* dw = slice<A>(partials.a, task, rows, e);
    A* dkt = slice<A>(partials.b, task, rows, d);
    fill(dw, rows * e, A(0));
    fill(dkt, rows * d, A(0));
    const int64_t m = padded(s.key_rows);
    transpose(slice<A>(g.kt, s.n, rows, d), s.key_rows, g.head_dim, d, scratch->kt, m, A(g.scale));
    transpose(slice<A>(g.w, s.n, rows, e), s.key_rows, g.value_dim, e, scratch->wt, m);
    const Rows<T> dquery = query_rows<T>(g.dquery, s, g.head_dim);
    for (int64_t i = from; i < to; i += kBlock) {
      const int64_t n = to - i < kBlock ? to - i : kBlock;
      if (idle) {
        fill(scratch->dquery, n * d, A(0));
      } else {
        query_block_backward<T>(g, s, dropout, i, n, *scratch, dw, dkt);
      }
      dquery.write(i, n, scratch->dquery);
    }
  }
}

// Task: problem. Sums the chunks in order: dW, dKt.
template <class T>
void query_pass_backward_merge(const Backward& g, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n_chunks = chunks(g.queries, g.landmarks), chunk = chunk_length(g.landmarks);
  const int64_t rows = g.keys.landmarks, d = g.head_width(), e = g.value_width();
  for (int64_t n = begin; n < end; ++n) {
    const Head s(g, n);
    A* dw = slice<A>(g.dw, n, rows, e);
    A* dkt = slice<A>(g.dkt, n, rows, d);
    fill(dw, rows * e, A(0));
    fill(dkt, rows * d, A(0));
    for (int64_t c = 0; c * chunk < s.queries; ++c) {
      add(dw, slice<A>(partials.a, n * n_chunks + c, rows, e), rows * e);
      add(dkt, slice<A>(partials.b, n * n_chunks + c, rows, d), rows * d);
    }
  }
}

}  // namespace
