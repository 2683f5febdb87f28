// Stage `key_pass`, backward: dK, dV (final) and the partial sums of dQt, dconv (mathematics.md, section 3, "key
// pass").
#pragma once

#include "convolution.h"
#include "key_pass.h"
#include "window_backward.h"

namespace {

// One query head's contribution to a block of dK, dV, and its own dQt: those that are wanted.
template <class A>
void key_block_backward(const Backward& g, const Head& s, int64_t first, int64_t n, Tile<A> k, Tile<A> v,
                        const KeyPassBackwardScratch<A>& scratch, A* dqt) {
  const Wanted& wanted = g.wanted;
  const int64_t rows = g.queries.landmarks, d = g.head_width(), e = g.value_width(), m = padded(s.query_rows);
  if (s.regime == Regime::nystrom || s.regime == Regime::exact_queries) {
    const int64_t skip = first < s.pinned ? (s.pinned - first < n ? s.pinned - first : n) : 0, left = n - skip;
    k.data += skip * k.ld;
    v.data += skip * v.ld;
    key_pass_probabilities(g, s, Dropout(g, s.n), first + skip, left, k, v, scratch);
    const A *p = scratch.scores, *ds = scratch.dscores;
    const A *du = slice<A>(g.du, s.n, rows, e), *qt = slice<A>(g.qt, s.n, rows, d);
    if (wanted.value) gemm<false>(left, e, s.query_rows, p, m, du, e, scratch.dvalue + skip * e, e, A(1), true);
    if (wanted.key) gemm<false>(left, d, s.query_rows, ds, m, qt, d, scratch.dkey + skip * d, d, A(1), true);
    if (wanted.query) gemm<true>(s.query_rows, d, left, ds, m, k.data, k.ld, dqt, d, A(1), true);
  }
  if (wanted.tokens() && (s.regime == Regime::nystrom || s.regime == Regime::exact_keys)) {
    add_landmark_gradients(g, s, first, n, scratch);
  }
}

// Packs what every block of one query head reads: s Qt^T, dU^T, LSE3, delta3, the taps.
template <class T>
void pack_query_head(const Backward& g, const Head& s, const KeyPassBackwardScratch<Acc<T>>& scratch) {
  using A = Acc<T>;
  const int64_t rows = g.queries.landmarks, d = g.head_width(), e = g.value_width(), m = padded(s.query_rows);
  if (g.taps) read_taps<T>(g, s.h, true, scratch.taps);
  if (!g.wanted.attention() || s.regime == Regime::exact_keys) return;
  if (s.window > 0) scratch.near.prepare_pattern(s);
  transpose(slice<A>(g.qt, s.n, rows, d), s.query_rows, g.head_dim, d, scratch.qt, m, A(g.scale));
  for (int64_t j = 0; j < m; ++j) {  // columns beyond the landmarks: P3 = exp(0 - infinity) = 0
    scratch.lse[j] = j < s.query_rows ? slice<A>(g.lse, s.n, rows)[j] : A(__builtin_inf());
  }
  if (!g.wanted.scores()) return;
  transpose(slice<A>(g.du, s.n, rows, e), s.query_rows, g.value_dim, e, scratch.dut, m);
  for (int64_t j = 0; j < m; ++j) {
    scratch.delta[j] = j < s.query_rows ? slice<A>(g.delta, s.n, rows)[j] : A(0);
  }
}

// dV += conv^T(dO), and the taps' gradients of one block, by lane.
template <class T>
void convolution_backward(const Backward& g, const Head& s, int64_t first, int64_t n, Tile<Acc<T>> v,
                          const KeyPassBackwardScratch<Acc<T>>& scratch) {
  const Convolution<T> conv{query_rows<T>(g.out, s, g.value_dim).by_position(),
                            g.queries.ignored ? g.queries.ignored + s.b * g.queries.length : nullptr,
                            g.queries.first ? s.queries : g.queries.length,
                            g.taps,
                            g.taps - 1 - g.taps / 2,
                            scratch.taps,
                            scratch.window};
  for_each_run(s.key_index, first, n, [&](int64_t row, int64_t position, int64_t count) {
    conv.read(position, count);
    if (g.wanted.value) conv.accumulate(count, {scratch.dvalue + row * g.value_width(), g.value_width()});
    if (g.wanted.conv) conv.correlate(count, v.data + row * v.ld, v.ld, scratch.dtaps);
  });
}

// Task: (key chunk, key head): the query heads of a group add to one dK, dV, which is rounded once. Partials: a = dQt
// of later chunks; b = dconv, (key chunk, head). The first chunk adds its dQt to the core's share.
template <class T>
void key_pass_backward(const Backward& g, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<KeyPassBackwardScratch<A>> scratch(static_cast<const Problem&>(g));
  const Slots slots = chunks(g.keys, g);
  const int64_t chunk = slots.size, group = g.group();
  const int64_t d = g.head_width(), e = g.value_width(), size = g.queries.landmarks * d;
  const Wanted& wanted = g.wanted;
  for (int64_t task = begin; task < end; ++task) {
    const ChunkTask of(task, g.kv_heads, slots);
    const Head shared(g, of.problem * group);
    const int64_t c = of.chunk;
    const int64_t from = c * chunk, to = shared.keys < from + chunk ? shared.keys : from + chunk;
    if (from >= to) continue;
    const bool has_dqt = wanted.query && (shared.regime == Regime::nystrom || shared.regime == Regime::exact_queries);
    A* dqt = c == 0 ? scratch->dqt : partial<A>(nullptr, partials.a, shared, g.heads, c, slots, size);
    A* dconv = slice<A>(partials.b, of.slot * g.heads + shared.h, g.taps);
    fill(dqt, has_dqt ? group * size : 0, A(0));
    fill(dconv, wanted.conv ? group * g.taps : 0, A(0));
    const Rows<T> key = key_rows<T>(g.key, shared, g.head_dim), value = key_rows<T>(g.value, shared, g.value_dim);
    for (int64_t i = from; i < to; i += kBlock) {
      const int64_t n = to - i < kBlock ? to - i : kBlock;
      Tile<A> k{}, v{};
      if (wanted.attention()) k = key.read(i, n, scratch->key);
      if (wanted.scores() || wanted.conv) v = value.read(i, n, scratch->value);
      if (wanted.key) fill(scratch->dkey, n * d, A(0));
      if (wanted.value) fill(scratch->dvalue, n * e, A(0));
      for (int64_t h = 0; h < group; ++h) {
        const Head s(g, shared.n + h);
        if (i == from || group > 1) pack_query_head<T>(g, s, *scratch);
        if (wanted.attention()) key_block_backward(g, s, i, n, k, v, *scratch, dqt + h * size);
        if (wanted.tokens() && s.window > 0) {
          window_keys_backward<T>(g, s, i, n, k, v, scratch->near, scratch->dkey, scratch->dvalue);
        }
        if (g.taps == 0 || !(wanted.value || wanted.conv)) continue;
        constexpr int W = Simd<A>::width;
        fill(scratch->dtaps, g.taps * W, A(0));
        convolution_backward<T>(g, s, i, n, v, *scratch);
        for (int64_t t = 0; wanted.conv && t < g.taps; ++t) {
          dconv[(h + 1) * g.taps - 1 - t] += sum<A>(load(scratch->dtaps + t * W));
        }
      }
      if (wanted.key) key_rows<T>(g.dkey, shared, g.head_dim).write(i, n, {scratch->dkey, d});
      if (wanted.value) key_rows<T>(g.dvalue, shared, g.value_dim).write(i, n, {scratch->dvalue, e});
    }
    if (c == 0 && has_dqt) add(slice<A>(g.dqt, shared.n, size), dqt, group * size);
  }
}

// Task: problem. Adds the later chunks in order: dQt; and in the first sample's tasks dconv, over all samples.
template <class T>
void key_pass_backward_merge(const Backward& g, const Partials& partials, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Slots slots = chunks(g.keys, g);
  const int64_t size = g.queries.landmarks * g.head_width();
  for (int64_t n = begin; n < end; ++n) {
    const Head s(g, n);
    for (int64_t c = 1; g.wanted.query && s.regime >= Regime::exact_queries && c * slots.size < s.keys; ++c) {
      add(slice<A>(g.dqt, n, size), partial<A>(nullptr, partials.a, s, g.heads, c, slots, size), size);
    }
    if (!g.wanted.conv || n >= g.heads) continue;
    A* dconv = slice<A>(g.dconv, n, g.taps);
    fill(dconv, g.taps, A(0));
    for (int64_t b = 0; b < g.batch; ++b) {
      for (int64_t c = 0; c * slots.size < g.keys.count[b]; ++c) {
        add(dconv, slice<A>(partials.b, (slots.begin(b) + c) * g.heads + n, g.taps), g.taps);
      }
    }
  }
}

}  // namespace
