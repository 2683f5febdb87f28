// Stage `query_pass`: O = softmax(s Q Kt^T) W + conv(V) (mathematics.md, section 2).
//
// A block takes kRowChunk queries, one row tile after another, over all columns of one softmax, group by group: the
// landmarks, with the pinned tokens, and the window.
#pragma once

#include "convolution.cuh"
#include "philox.cuh"
#include "sweep.cuh"
#include "window.cuh"

namespace nystrom_ext::cuda {

struct QueryPassParameters : Forward {
  int column_slots;
};

template <class E>
struct QueryPass {
  using T = typename E::T;
  using A = typename E::Acc;
  using Queries = TokenStream<E, E::kRows, 1>;
  static __host__ __device__ int shared(const Problem& p) {  // and the column tiles
    return E::scratch(p.taps > 0) + Queries::kBytes;
  }

  // Logits of a row tile over one column tile, in units of log2.
  template <class Row>
  static __device__ typename E::Scores logits(const Forward& f, const Row& q, const ColumnTiles<E>& columns, int j,
                                              char* scratch) {
    typename E::Scores s = E::scores(q, columns.first(j), scratch);
    const A scale = A(f.scale * kLog2e);
    const int count = columns.a.rows - j * E::kCols;
    for_each(s, E::kRowsPerThread, [&](int, int c, A& x) { x = E::column(c) < count ? x * scale : A(-kInfinity); });
    return s;
  }

  // x *= the dropout multiplier of P1's entry.
  static __device__ void drop(const Dropout& dropout, const Head& s, int first, int end, int j, typename E::Scores& x) {
    if (!dropout.on()) return;
    const uint32_t kept = dropout.kept<E>([&](int i, int c, int& row, int& column) {
      if (first + E::row(i) >= end) return false;
      row = s.queries.position(first + E::row(i));
      column = j * E::kCols + E::column(c);
      return true;
    });
    dropout.apply<E>(kept, x);
  }

  // softmax(s Q Kt^T) W of the row tile at `first`, with a window softmax(s Q (Kt, K)^T) (W, V).
  static __device__ typename E::Output attend(const Forward& f, const Head& s, const Queries& queries,
                                              ColumnTiles<E>& columns, const Window<E>& window, int first, int out0,
                                              char* scratch) {
    const Dropout dropout{f, s.n};
    typename E::Output o;
    Softmax<E> softmax;
    queries.next(first);
    for (int j = 0; j < columns.tiles(); ++j) {
      columns.load(j);
      typename E::Scores p = logits(f, queries.tile(0, first), columns, j, scratch);
      if (E::kWindow && s.extended) window.add_bias(p, first, queries.end, j * E::kCols);
      softmax.add(p);
      softmax.rescale(o);
      drop(dropout, s, first, queries.end, j, p);
      E::template accumulate<2>(o, p, columns.second(j), out0, scratch);
    }
    if (E::kWindow && s.window > 0) attend_window(s, queries, window, dropout, softmax, first, out0, scratch, o);
    for_each(o, E::kRowsPerThread, [&](int i, int, A& x) { x /= softmax.sum[i]; });
    Queries::done();
    return o;
  }

  // The window's columns of the same softmax.
  static __device__ void attend_window(const Head& s, const Queries& queries, const Window<E>& window,
                                       const Dropout& dropout, Softmax<E>& softmax, int first, int out0, char* scratch,
                                       typename E::Output& o) {
    window.for_each_tile(first, queries.end, [&](const typename Window<E>::Stream& keys, int tile) {
      typename E::Scores p = window.logits(queries.tile(0, first), keys, tile, first, queries.end, scratch);
      softmax.add(p);
      softmax.rescale(o);
      if (dropout.on()) dropout.apply<E>(window.kept(dropout, keys, tile, first, queries.end), p);
      E::template accumulate<2>(o, p, keys.tile(1, tile), out0, scratch);
    });
  }

  // Every query is its own landmark: O_i = U_i.
  static __device__ typename E::Output copy(const Forward& f, const Head& s, int first, int out0) {
    const A* u = slice<A>(f.u, s.n, f.queries.landmarks, f.value_width());
    typename E::Output o;
    for_each(o, E::kRowsPerThread, [&](int i, int j, A& x) {
      const int row = first + E::row(i);
      const int column = out0 + E::column(j);
      if (row < s.queries.rows && column < f.value_width()) x = u[row * f.value_width() + column];
    });
    return o;
  }
};

template <class E>
__global__ void __launch_bounds__(E::kThreads, E::kBlocks) query_pass(const __grid_constant__ QueryPassParameters f) {
  using Pass = QueryPass<E>;
  using T = typename E::T;
  using A = typename E::Acc;
  const ChunkTask task(blockIdx.x, f.heads, row_chunks(f, f.queries));
  const Head s(f, task.problem(f.heads));
  const int begin = task.chunk * kRowChunk, end = min(begin + kRowChunk, s.queries.count);
  const int out0 = int(blockIdx.y) * E::kOut;
  if (begin >= end) return;

  char* scratch = dynamic_shared_memory();
  const typename Pass::Queries queries{
      {query_rows<const T>(f.query, s, f.head_dim)}, begin, end, scratch + E::scratch(f.taps > 0)};
  ColumnTiles<E> columns{{slice<A>(f.kt, s.n, f.columns(), f.head_width()), int(f.head_width()), s.columns()},
                         {slice<A>(f.w, s.n, f.columns(), f.value_width()), int(f.value_width()), s.columns()},
                         scratch + Pass::shared(f),
                         f.column_slots};
  const Window<E> window{f, s, columns.end()};

  if (s.has_query_pass()) queries.start();
  for (int first = begin; first < end; first += E::kRows) {
    const int count = min(end - first, E::kRows);
    typename E::Output o;
    if (s.has_query_pass()) o = Pass::attend(f, s, queries, columns, window, first, out0, scratch);
    if (s.regime == Regime::exact_queries) o = Pass::copy(f, s, first, out0);
    if (f.taps) convolve(E{}, o, value_convolution<T>(f, s), s.queries, first, count, out0, scratch);
    E::store(o, query_rows<T>(f.out, s, f.value_dim), first, count, out0);
  }
}

}  // namespace nystrom_ext::cuda
