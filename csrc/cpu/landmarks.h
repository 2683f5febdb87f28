// Stage `landmarks`: Qt_j, Kt_j = means of Q, K over the valid tokens of segment j (mathematics.md, sections 1 and 2).
// Pinned tokens are left out of Kt_j and follow as rows of their own (section 6).
#pragma once

#include "tile.h"

namespace {

constexpr int64_t kMeanBlock = 64;  // rows summed by themselves: the error grows with n / 64, not with n

template <class A>
struct LandmarksScratch {
  A *rows, *partial;
  LandmarksScratch() = default;
  LandmarksScratch(Arena& arena, const Problem& p)
      : rows(arena.take<A>(kMeanBlock * p.head_width())), partial(arena.take<A>(p.head_width())) {}
};

template <class T>
void segment_mean(const Rows<T>& x, int64_t begin, int64_t end, Acc<T>* mean, const LandmarksScratch<Acc<T>>& scratch) {
  using A = Acc<T>;
  const int64_t width = padded(x.columns);
  fill(mean, width, A(0));
  for (int64_t first = begin; first < end; first += kMeanBlock) {
    const int64_t count = end - first < kMeanBlock ? end - first : kMeanBlock;
    const Tile<A> tile = x.read(first, count, scratch.rows);
    sum_rows(tile.data, count, tile.ld, scratch.partial, width);
    add(mean, scratch.partial, width);
  }
  const A size = A(end > begin ? end - begin : 1);  // an empty segment: zeros
  for (int64_t c = 0; c < width; ++c) mean[c] /= size;
}

// Task: (segment, problem), so that the segments of one long sample among short ones go to all threads.
template <class T>
void landmarks(const Forward& f, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<LandmarksScratch<A>> scratch(static_cast<const Problem&>(f));
  const int64_t width = f.head_width();
  for (int64_t task = begin; task < end; ++task) {
    const Head s(f, task % f.problems());
    const int64_t j = task / f.problems();
    if (j < s.query_rows) {
      segment_mean(query_rows<T>(f.query, s, f.head_dim), s.query_offsets[j], s.query_offsets[j + 1],
                   slice<A>(f.qt, s.n, f.queries.landmarks, width) + j * width, *scratch);
    }
    const Rows<T> key = key_rows<T>(f.key, s, f.head_dim);
    A* kt = slice<A>(f.kt, s.n, f.columns(), width) + j * width;
    if (j < s.key_rows) {
      segment_mean(key, s.key_begin(j), s.key_end(j), kt, *scratch);
    } else if (j < s.columns()) {
      key.read(key.position(j - s.key_rows), kt);
    }
  }
}

// Adds each query landmark's gradient to the queries it is the mean of: dQ_i += dQt_j / |segment j|.
// Task: (segment, problem).
template <class T>
void landmarks_backward(const Backward& g, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<LandmarksScratch<A>> scratch(static_cast<const Problem&>(g));
  const int64_t segments = g.queries.landmarks, width = g.head_width();
  for (int64_t task = begin; task < end; ++task) {
    const Head s(g, task % g.problems());
    const int64_t j = task / g.problems();
    if (j >= s.query_rows || s.regime == Regime::empty || s.regime == Regime::exact_keys) continue;
    const A* dqt = slice<A>(g.dqt, s.n, segments, width) + j * width;
    const int64_t from = s.query_offsets[j], to = s.query_offsets[j + 1];
    for (int64_t x = 0; x < width; ++x) scratch->partial[x] = dqt[x] / A(to - from);
    const Rows<T> dquery = query_rows<T>(g.dquery, s, g.head_dim);
    for (int64_t first = from; first < to; first += kMeanBlock) {
      const int64_t count = to - first < kMeanBlock ? to - first : kMeanBlock;
      const Place<A> dq = dquery.place(first, count, scratch->rows);
      dquery.read(first, count, scratch->rows);
      for (int64_t i = 0; i < count; ++i) add(dq.data + i * dq.ld, scratch->partial, width);
      dquery.write(first, count, dq);
    }
  }
}

}  // namespace
