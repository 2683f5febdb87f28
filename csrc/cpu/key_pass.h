// Stage `key_pass`: U = softmax(s Qt K^T) V and LSE3, for m query landmarks over all keys (mathematics.md, section 2).
//
// A tile of scores is stored key by key, (keys, landmarks): the softmax over keys then runs down the columns, one
// landmark per vector lane, and the tile serves as the transposed operand of U += P^T V as it stands.
#pragma once

#include "window.h"

namespace {

template <class A>
struct KeyPassScratch {
  A *qt, *scores, *key, *value, *rescale;
  KeyPassScratch() = default;
  KeyPassScratch(Arena& arena, const Problem& p) {
    const int64_t m = padded(p.queries.landmarks);
    qt = arena.take<A>(p.head_dim * m);
    scores = arena.take<A>(kBlock * m);
    key = arena.take<A>(kBlock * p.head_width());
    value = arena.take<A>(kBlock * p.value_width());
    rescale = arena.take<A>(m);
  }
};

// One block of the online softmax: scores -> exp(scores - running maximum); rescale = exp(old - new maximum). Keys so
// far that all score -infinity have weight zero: their maximum is nothing to subtract.
template <class A>
void online_softmax(A* scores, int64_t keys, int64_t ld, A* maxima, A* sums, A* rescale) {
  constexpr int W = Simd<A>::width;
  for (int64_t j = 0; j < ld; j += W) {
    const Vec<A> old = load(maxima + j);
    Vec<A> top = old;
    for (int64_t i = 0; i < keys; ++i) top = maximum(top, load(scores + i * ld + j));
    const Vec<A> base = top == Vec<A>{} - A(__builtin_inf()) ? Vec<A>{} : top;
    const Vec<A> factor = exp<A>(old - base);
    Vec<A> total = load(sums + j) * factor;
    for (int64_t i = 0; i < keys; ++i) {
      const Vec<A> e = exp<A>(load(scores + i * ld + j) - base);
      store(scores + i * ld + j, e);
      total += e;
    }
    store(maxima + j, top);
    store(sums + j, total);
    store(rescale + j, factor);
  }
}

template <class A>
void scale_rows(A* x, const A* factors, int64_t rows, int64_t width) {
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t c = 0; c < width; ++c) x[j * width + c] *= factors[j];
  }
}

// Where L' <= m the key pass is the exact attention itself and applies its dropout: rows are query positions.
template <class A>
void drop_columns(const Dropout& dropout, const Head& s, int64_t first, int64_t keys, A* scores, int64_t ld) {
  for (int64_t j = 0; j < s.query_rows; ++j) {
    dropout.apply(s.query_index ? s.query_index[j] : j, s.key_index, first, keys, scores + j, ld);
  }
}

// Task: (key chunk, head). Partials: a = U of later chunks, unnormalised; b = maxima and c = sums of each task.
template <class T>
void key_pass(const Forward& f, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<KeyPassScratch<A>> scratch(static_cast<const Problem&>(f));
  const Slots slots = chunks(f.keys, f);
  const int64_t chunk = slots.size, width = f.value_width();
  for (int64_t task = begin; task < end; ++task) {
    const ChunkTask of(task, f.heads, slots);
    const Head s(f, of.problem);
    const int64_t from = of.chunk * chunk, to = s.keys < from + chunk ? s.keys : from + chunk;
    if (from >= to || s.regime == Regime::exact_keys) continue;
    const Dropout dropout(f, s.n);
    const int64_t rows = f.queries.landmarks, m = padded(s.query_rows);
    A* u = partial<A>(f.u, partials.a, s, f.heads, of.chunk, slots, rows * width);
    A* maxima = slice<A>(partials.b, task, padded(rows));
    A* sums = slice<A>(partials.c, task, padded(rows));
    fill(u, s.query_rows * width, A(0));
    fill(maxima, m, A(-__builtin_inf()));
    fill(sums, m, A(0));
    transpose(slice<A>(f.qt, s.n, rows, f.head_width()), s.query_rows, f.head_dim, f.head_width(), scratch->qt, m,
              A(f.scale));
    const Rows<T> key = key_rows<T>(f.key, s, f.head_dim), value = key_rows<T>(f.value, s, f.value_dim);
    const int64_t first = from < s.pinned ? s.pinned : from;
    for (int64_t i = first; i < to; i += kBlock) {
      const int64_t n = to - i < kBlock ? to - i : kBlock;
      const Tile<A> k = key.read(i, n, scratch->key);
      gemm<false>(n, m, f.head_dim, k.data, k.ld, scratch->qt, m, scratch->scores, m);
      online_softmax(scratch->scores, n, m, maxima, sums, scratch->rescale);
      if (i > first) scale_rows(u, scratch->rescale, s.query_rows, width);
      if (dropout.on() && s.regime == Regime::exact_queries) drop_columns(dropout, s, i, n, scratch->scores, m);
      const Tile<A> v = value.read(i, n, scratch->value);
      gemm<true>(s.query_rows, width, n, scratch->scores, m, v.data, v.ld, u, width, A(1), true);
    }
  }
}

// Task: problem. Merges the chunks in order and normalises: U, LSE3.
template <class T>
void key_pass_merge(const Forward& f, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Slots slots = chunks(f.keys, f);
  const int64_t rows = f.queries.landmarks, width = f.value_width();
  for (int64_t n = begin; n < end; ++n) {
    const Head s(f, n);
    if (s.regime == Regime::empty || s.regime == Regime::exact_keys) continue;
    const int64_t used = divide_up(s.keys, slots.size), first = slots.begin(s.b);
    for (int64_t j = 0; j < s.query_rows; ++j) {
      const auto at = [&](void* buffer, int64_t c) {
        return slice<A>(buffer, (first + c) * f.heads + s.h, padded(rows))[j];
      };
      A top = at(partials.b, 0), total = 0;
      for (int64_t c = 1; c < used; ++c) top = maximum(top, at(partials.b, c));
      A* u = slice<A>(f.u, n, rows, width) + j * width;
      for (int64_t c = 0; c < used; ++c) {
        const A factor = __builtin_exp(at(partials.b, c) - top);
        const A* part = partial<A>(f.u, partials.a, s, f.heads, c, slots, rows * width) + j * width;
        total += factor * at(partials.c, c);
        for (int64_t x = 0; x < width; ++x) u[x] = c == 0 ? factor * u[x] : u[x] + factor * part[x];
      }
      for (int64_t x = 0; x < width; ++x) u[x] /= total;
      slice<A>(f.lse, n, rows)[j] = top + __builtin_log(total);
    }
  }
}

template <class A>
struct KeyPassBackwardScratch {
  A *qt, *dut, *dqt, *scores, *dscores, *key, *value, *dkey, *dvalue, *lse, *delta, *share;
  A *taps, *window, *dtaps;
  WindowScratch<A> near;
  KeyPassBackwardScratch() = default;
  KeyPassBackwardScratch(Arena& arena, const Problem& p) {
    const int64_t m = padded(p.queries.landmarks), d = p.head_width(), e = p.value_width();
    qt = arena.take<A>(p.head_dim * m);
    dut = arena.take<A>(p.value_dim * m);
    dqt = arena.take<A>(p.group() * p.queries.landmarks * d);
    scores = arena.take<A>(kBlock * m);
    dscores = arena.take<A>(kBlock * m);
    key = arena.take<A>(kBlock * d);
    value = arena.take<A>(kBlock * e);
    dkey = arena.take<A>(kBlock * d);
    dvalue = arena.take<A>(kBlock * e);
    lse = arena.take<A>(m);
    delta = arena.take<A>(m);
    share = arena.take<A>(d);
    taps = arena.take<A>(p.taps);
    window = arena.take<A>(p.taps ? (kBlock + p.taps) * e : 0);
    dtaps = arena.take<A>(p.taps * Simd<A>::width);
    near = WindowScratch<A>(arena, p);
  }
};

// P3 = exp(S3 - LSE3) of one block, key by key, where nobody asks for dS3.
template <class A>
void exponentiate(A* p, const A* lse, int64_t n, int64_t m) {
  for (int64_t j = 0; j < m; j += Simd<A>::width) {
    const Vec<A> base = load(lse + j);
    for (int64_t i = j; i < n * m; i += m) store(p + i, exp<A>(load(p + i) - base));
  }
}

// P3 and s dS3 of one block: dS3 = P3 * (D * (V dU^T) - delta3), D: dropout.
template <class A>
void differentiate(A* p, A* dp, A scale, const A* lse, const A* delta, int64_t n, int64_t m) {
  for (int64_t j = 0; j < m; j += Simd<A>::width) {
    const Vec<A> base = load(lse + j), mean = load(delta + j);
    for (int64_t i = j; i < n * m; i += m) {
      const Vec<A> e = exp<A>(load(p + i) - base);
      store(p + i, e);
      store(dp + i, scale * e * (load(dp + i) - mean));
    }
  }
}

// Both, or with dV alone P3, of one block; D * P3 with dropout.
template <class A>
void key_pass_probabilities(const Backward& g, const Head& s, const Dropout& dropout, int64_t first, int64_t n,
                            Tile<A> k, Tile<A> v, const KeyPassBackwardScratch<A>& scratch) {
  const int64_t m = padded(s.query_rows);
  A *p = scratch.scores, *dp = scratch.dscores;
  const bool drop = dropout.on() && s.regime == Regime::exact_queries;
  gemm<false>(n, m, g.head_dim, k.data, k.ld, scratch.qt, m, p, m);
  if (g.wanted.scores()) {
    gemm<false>(n, m, g.value_dim, v.data, v.ld, scratch.dut, m, dp, m);
    if (drop) drop_columns(dropout, s, first, n, dp, m);
    differentiate(p, dp, A(g.scale), scratch.lse, scratch.delta, n, m);
  } else {
    exponentiate(p, scratch.lse, n, m);
  }
  if (drop && g.wanted.value) drop_columns(dropout, s, first, n, p, m);
}

// Each key gets its share of its landmark's gradient, dKt_j / |segment j|. In the exact regime segments hold one key,
// and dW_j is the value's own gradient. A pinned token has a row to itself.
template <class A>
void add_landmark_gradients(const Backward& g, const Head& s, int64_t first, int64_t n,
                            const KeyPassBackwardScratch<A>& scratch) {
  const int64_t d = g.head_width(), e = g.value_width();
  const A* dkt = slice<A>(g.dkt, s.n, g.columns(), d);
  const A* dw = slice<A>(g.dw, s.n, g.columns(), e);
  int64_t j = 0, shared = -1;  // the row whose share is at hand: a division costs more than the sum
  for (int64_t i = 0; i < n; ++i) {
    const bool pinned = first + i < s.pinned;
    while (!pinned && s.key_end(j) <= first + i) ++j;
    const int64_t row = pinned ? s.key_rows + first + i : j;
    if (row != shared && g.wanted.key) {
      const A size = A(pinned ? 1 : s.key_end(j) - s.key_begin(j));
      for (int64_t x = 0; x < d; ++x) scratch.share[x] = dkt[row * d + x] / size;
      shared = row;
    }
    if (g.wanted.key) add(scratch.dkey + i * d, scratch.share, d);
    if (g.wanted.value && (pinned || s.regime == Regime::exact_keys)) {
      add(scratch.dvalue + i * e, dw + row * e, e);
    }
  }
}

}  // namespace
