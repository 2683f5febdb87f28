// Stage `key_pass`: U = softmax(s Qt K^T) V, few rows over many keys (mathematics.md, section 2).
//
// A block takes 64 landmarks over one chunk of keys and leaves the chunk's (maximum, sum, unnormalised U); core.cuh
// merges the chunks in order.
#pragma once

#include "philox.cuh"
#include "sweep.cuh"

namespace nystrom_ext::cuda {

// Partial sums over (chunk of keys, head), rows as in U.
template <class A>
struct KeyPartials {
  A *u, *max, *sum;
};

template <class E>
struct KeyPass {
  using T = typename E::T;
  using A = typename E::Acc;
  using Keys = TokenStream<E, E::kCols, 2>;
  static constexpr int kRowTile = E::kRows * E::kLandmarkTile;
  static constexpr int kShared = E::scratch(false) + kRowTile + Keys::kBytes;

  // Logits of one tile in units of log2.
  template <class Row>
  static __device__ typename E::Scores logits(const Forward& f, const Row& qt, const Keys& keys, int first,
                                              char* scratch) {
    typename E::Scores s = E::scores(qt, keys.tile(0, first), scratch);
    const A scale = A(f.scale * kLog2e);
    for_each(s, E::kRowsPerThread,
             [&](int, int j, A& x) { x = first + E::column(j) < keys.end ? x * scale : A(-kInfinity); });
    return s;
  }

  // P3 is the attention matrix, whose entries drop, only where every query is its own landmark.
  static __device__ bool drops(const Dropout& dropout, const Head& s) {
    return dropout.on() && s.regime == Regime::exact_queries;
  }
  static __device__ bool entry(const Head& s, int landmark, int key, int& row, int& column) {
    if (landmark >= s.queries.rows || key >= s.keys.count) return false;
    row = s.queries.position(landmark);
    column = s.keys.position(key);
    return true;
  }
  static __device__ void drop(const Dropout& dropout, const Head& s, int row0, int first, typename E::Scores& p) {
    if (!drops(dropout, s)) return;
    const uint32_t kept = dropout.kept<E>([&](int i, int j, int& row, int& column) {
      return entry(s, row0 + E::row(i), first + E::column(j), row, column);
    });
    dropout.apply<E>(kept, p);
  }

  static __device__ void run(const Forward& f, const KeyPartials<A>& partials, int64_t block, int out0) {
    const int rows = int(f.queries.landmarks), width = int(f.value_width());
    const int row_tiles = int(divide_up(rows, E::kRows));
    const ChunkTask task(block / row_tiles, f.heads, chunks(f, f.keys));
    const Head s(f, task.problem(f.heads));
    const int chunk = task.chunk;
    const int row0 = int(block % row_tiles) * E::kRows;
    const Keys keys{{key_rows<const T>(f.key, s, f.head_dim), key_rows<const T>(f.value, s, f.value_dim)},
                    max(chunk * kChunk, s.pinned),  // pinned keys are no part of P3
                    min(chunk * kChunk + kChunk, s.keys.count),
                    dynamic_shared_memory() + E::scratch(false) + kRowTile};
    if (!s.has_key_pass() || row0 >= s.queries.rows || keys.begin >= keys.end) return;

    char *scratch = dynamic_shared_memory(), *tile = scratch + E::scratch(false);
    const A* qt = slice<A>(f.qt, s.n, rows, f.head_width());
    E::template load<E::kRows>(tile, qt, int(f.head_width()), row0, s.queries.rows);
    const auto a = E::template landmarks<E::kRows>(tile, qt, int(f.head_width()), row0, s.queries.rows);

    const Dropout dropout{f, s.n};
    typename E::Output u;
    Softmax<E> softmax;
    keys.start();
    for (int first = keys.begin; first < keys.end; first += E::kCols) {
      keys.next(first);
      typename E::Scores p = logits(f, a, keys, first, scratch);
      softmax.add(p);
      softmax.rescale(u);
      drop(dropout, s, row0, first, p);
      E::template accumulate<2>(u, p, keys.tile(1, first), out0, scratch);
      Keys::done();
    }

    const int64_t slot = (task.slot * f.heads + s.h) * rows;
    for_each(u, E::kRowsPerThread, [&](int i, int j, A& x) {
      const int row = row0 + E::row(i), column = out0 + E::column(j);
      if (row < s.queries.rows && column < width) partials.u[(slot + row) * width + column] = x;
    });
    for (int i = 0; i < E::kRowsPerThread; ++i) {
      const int row = row0 + E::row(i);
      if (row >= s.queries.rows || E::column(0) != 0 || out0 != 0) continue;
      partials.max[slot + row] = softmax.max[i];
      partials.sum[slot + row] = softmax.sum[i];
    }
  }
};

}  // namespace nystrom_ext::cuda
