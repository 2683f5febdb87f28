// Stage `query_pass`, backward (mathematics.md, section 3), in two sweeps of the queries.
//
// By queries: dQ = s dS1 Kt, the direct share, and each query's LSE1 and delta1 = rowsum(P1 * dP1).
// By landmarks, with those: dW = (D * P1)^T dO and dKt = s dS1^T Q over one chunk of queries. D: dropout.
// With dV alone the first leaves LSE1 and the second dW.
#pragma once

#include "columns.cuh"
#include "query_pass.cuh"

namespace nystrom_ext::cuda {

struct QueryPassBackwardParameters : Backward {
  int column_slots;
  void *dw_part, *dkt_part;  // (chunks of queries, H, columns, value_width or head_width)
  void* dmissed_rows;        // a number a query: the sum of dS1 over the landmarks; null unless extended
};

template <class E>
struct QueryPassBackward {
  using T = typename E::T;
  using A = typename E::Acc;
  using Pass = QueryPass<E>;
  using Queries = TokenStream<E, E::kRows, 2>;
  static constexpr int kShared = E::scratch(false) + Queries::kBytes;  // and the column tiles

  const QueryPassBackwardParameters& g;
  const Head& s;
  const Queries& queries;
  const Window<E>& window;
  const Dropout dropout;
  char* scratch;

  // Logits and D * dP1 = D * (dO W^T), whether or not somebody asks for dS1: a branch here costs registers.
  __device__ void compute(ColumnTiles<E>& columns, int first, int j, typename E::Scores& logits,
                          typename E::Scores& dp) const {
    columns.load(j);
    logits = Pass::logits(g, queries.tile(0, first), columns, j, scratch);
    if (E::kWindow && s.extended) window.add_bias(logits, first, queries.end, j * E::kCols);
    dp = E::scores(queries.tile(1, first), columns.second(j), scratch);
    Pass::drop(dropout, s, first, queries.end, j, dp);
  }

  // The same for one tile of the window's keys.
  __device__ void compute_window(const typename Window<E>::Stream& keys, int first, int tile,
                                 typename E::Scores& logits, typename E::Scores& dp) const {
    logits = window.logits(queries.tile(0, first), keys, tile, first, queries.end, scratch);
    dp = E::scores(queries.tile(1, first), keys.tile(1, tile), scratch);
    if (dropout.on()) dropout.apply<E>(window.kept(dropout, keys, tile, first, queries.end), dp);
  }

  static __device__ void add_statistics(Softmax<E>& softmax, const typename E::Scores& logits, typename E::Scores& dp,
                                        A (&delta)[E::kRowsPerThread]) {
    typename E::Scores p = logits;
    softmax.add(p);
#pragma unroll
    for (int i = 0; i < E::kRowsPerThread; ++i) {
      A sum = 0;
#pragma unroll
      for (int c = 0; c < E::Scores::kColumns; ++c) sum += p.at(i, c) * dp.at(i, c);
      delta[i] = delta[i] * softmax.shrink[i] + E::row_sum(sum);
    }
  }

  // LSE1 and delta1 of this thread's rows; leaves logits and dP1 of the last column tile.
  __device__ void statistics(ColumnTiles<E>& columns, int first, typename E::Scores& logits, typename E::Scores& dp,
                             A (&lse)[E::kRowsPerThread], A (&delta)[E::kRowsPerThread]) const {
    Softmax<E> softmax;
    for (int i = 0; i < E::kRowsPerThread; ++i) delta[i] = 0;
    for (int j = 0; j < columns.tiles(); ++j) {
      compute(columns, first, j, logits, dp);
      add_statistics(softmax, logits, dp, delta);
    }
    if (E::kWindow && s.window > 0) {
      window.for_each_tile(first, queries.end, [&](const typename Window<E>::Stream& keys, int tile) {
        compute_window(keys, first, tile, logits, dp);
        add_statistics(softmax, logits, dp, delta);
      });
    }
#pragma unroll
    for (int i = 0; i < E::kRowsPerThread; ++i) {
      delta[i] /= softmax.sum[i];
      lse[i] = softmax.max[i] + log2(softmax.sum[i]);
      const int row = first + E::row(i);
      if (row >= queries.end || E::column(0) != 0 || blockIdx.y != 0) continue;
      query_slice<A>(g.lse1, g, s)[row] = lse[i];
      if (g.wanted.scores()) query_slice<A>(g.delta1, g, s)[row] = delta[i];
    }
  }

  // dP1 becomes dS1; excess: what its rows sum to after rounding, and before they sum to zero.
  static __device__ void differentiate(typename E::Scores& logits, typename E::Scores& dp, A (&lse)[E::kRowsPerThread],
                                       A (&delta)[E::kRowsPerThread], A (&excess)[E::kRowsPerThread]) {
    for_each(dp, E::kRowsPerThread, [&](int i, int c, A& x) {
      x = probability<E>(logits.at(i, c), lse[i]) * (x - delta[i]);
      excess[i] += E::rounded(x);
    });
  }

  __device__ void sum_landmarks(typename E::Scores& ds, int j, A (&missed)[E::kRowsPerThread]) const {
    for_each(ds, E::kRowsPerThread, [&](int i, int c, A& x) {
      if (j * E::kCols + E::column(c) < s.keys.rows) missed[i] += x;
    });
  }
  __device__ void store_missed(int first, A (&missed)[E::kRowsPerThread]) const {
#pragma unroll
    for (int i = 0; i < E::kRowsPerThread; ++i) {
      const A sum = E::row_sum(missed[i]);
      const int row = first + E::row(i);
      if (row < queries.end && E::column(0) == 0 && blockIdx.y == 0) {
        query_slice<A>(g.dmissed_rows, g, s)[row] = sum;
      }
    }
  }

  // s dS1 Kt of the row tile at `first`.
  __device__ typename E::Output dquery(ColumnTiles<E>& columns, int first, int out0) const {
    typename E::Scores logits, dp;
    A lse[E::kRowsPerThread], delta[E::kRowsPerThread], excess[E::kRowsPerThread] = {};
    A missed[E::kRowsPerThread] = {};
    queries.next(first);
    statistics(columns, first, logits, dp, lse, delta);
    typename E::Output dq;
    for (int j = 0; j < columns.tiles(); ++j) {
      if (columns.tiles() > 1 || (E::kWindow && s.window > 0)) compute(columns, first, j, logits, dp);
      differentiate(logits, dp, lse, delta, excess);
      if (E::kWindow && s.extended) sum_landmarks(dp, j, missed);
      E::accumulate(dq, dp, columns.first(j), out0, scratch);
    }
    if (E::kWindow && s.extended && g.wanted.scores()) store_missed(first, missed);
    if (E::kWindow && s.window > 0) {
      window.for_each_tile(first, queries.end, [&](const typename Window<E>::Stream& keys, int tile) {
        compute_window(keys, first, tile, logits, dp);
        differentiate(logits, dp, lse, delta, excess);
        E::accumulate(dq, dp, keys.tile(0, tile), out0, scratch);
      });
    }
    center(dq, columns.a, first, out0, excess);
    Queries::done();
    return dq;
  }

  // A row of dS1 sums to zero before it is rounded: taking what it sums to after that from the landmark of the query's
  // own segment removes most of the rounding error (mathematics.md, section 4).
  __device__ void center(typename E::Output& dq, const Buffer<A>& kt, int first, int out0,
                         A (&excess)[E::kRowsPerThread]) const {
#pragma unroll
    for (int i = 0; i < E::kRowsPerThread; ++i) {
      excess[i] = E::row_sum(excess[i]);
      const int rank = first + E::row(i);
      if (rank >= queries.end) continue;
      const A* own = kt.data + (int64_t(rank) * s.keys.rows / s.queries.count) * kt.width + out0;
#pragma unroll
      for (int c = 0; c < E::Output::kColumns; ++c) {
        const A reference = out0 + E::column(c) < kt.width ? own[E::column(c)] : A(0);
        dq.at(i, c) = A(g.scale) * (dq.at(i, c) - excess[i] * reference);
      }
    }
  }
};

template <class E>
__global__ void __launch_bounds__(E::kThreads, E::kBlocks)
    query_pass_backward_by_queries(const __grid_constant__ QueryPassBackwardParameters g) {
  using T = typename E::T;
  using A = typename E::Acc;
  using Pass = QueryPassBackward<E>;
  const ChunkTask task(blockIdx.x, g.heads, row_chunks(g, g.queries));
  const Head s(g, task.problem(g.heads));
  const int begin = task.chunk * kRowChunk, end = min(begin + kRowChunk, s.queries.count);
  const int out0 = int(blockIdx.y) * E::kOut;
  if (begin >= end) return;

  char* scratch = dynamic_shared_memory();
  const typename Pass::Queries queries{
      {query_rows<const T>(g.query, s, g.head_dim), query_rows<const T>(g.out, s, g.value_dim)},
      begin,
      end,
      scratch + E::scratch(false)};
  ColumnTiles<E> columns{{slice<A>(g.kt, s.n, g.columns(), g.head_width()), int(g.head_width()), s.columns()},
                         {slice<A>(g.w, s.n, g.columns(), g.value_width()), int(g.value_width()), s.columns()},
                         scratch + Pass::kShared,
                         g.column_slots};
  const Window<E> window{g, s, columns.end()};
  const Pass pass{g, s, queries, window, Dropout{g, s.n}, scratch};

  if (s.has_query_pass()) queries.start();
  for (int first = begin; first < end; first += E::kRows) {
    typename E::Output dq;
    if (s.has_query_pass()) dq = pass.dquery(columns, first, out0);
    if (g.wanted.query) E::store(dq, query_rows<T>(g.dquery, s, g.head_dim), first, min(end - first, E::kRows), out0);
  }
}

// The sweep by landmarks: rows are landmarks, columns are queries.
template <class E>
struct LandmarkSweep {
  using T = typename E::T;
  using A = typename E::Acc;
  using Queries = TokenStream<E, E::kCols, 2>;
  static constexpr int kRowTile = E::kRows * E::kLandmarkTile;
  static constexpr int kShared = E::scratch(false) + 2 * kRowTile + Queries::kBytes;

  // P1^T and dP1^T of one tile become D * P1 and dS1.
  static __device__ void probabilities(const QueryPassBackwardParameters& g, const Head& s, const Dropout& dropout,
                                       int row0, int first, int end, typename E::Scores& p, typename E::Scores& ds,
                                       char* bias) {
    const A scale = A(g.scale * kLog2e);
    for_each(p, E::kRowsPerThread, [&](int, int, A& x) { x *= scale; });
    if (E::kWindow && s.extended) {
      add_landmark_bias<E>(g, s, p, bias, end, [&](int row, int column, int& query, int& j) {
        query = first + column;
        j = row0 + row;
      });
    }
    const A* lse = query_slice<A>(g.lse1, g, s);
    const A* delta = g.wanted.key ? query_slice<A>(g.delta1, g, s) : nullptr;
    const auto kept = [&] {
      return dropout.kept<E>([&](int i, int j, int& row, int& column) {
        if (first + E::column(j) >= end) return false;
        row = s.queries.position(first + E::column(j));
        column = row0 + E::row(i);
        return true;
      });
    };
    const ColumnStatistics<A> statistics{lse, delta, first, end, A(1)};
    differentiate_columns<E>(p, ds, statistics, A(1), dropout, dropout.on(), kept, [](int, int) { return true; });
  }
};

template <class E>
__global__ void __launch_bounds__(E::kThreads, E::kBlocks)
    query_pass_backward_by_landmarks(const __grid_constant__ QueryPassBackwardParameters g) {
  using T = typename E::T;
  using A = typename E::Acc;
  using Sweep = LandmarkSweep<E>;
  const int rows = int(g.columns());
  const int d = int(g.head_width()), e = int(g.value_width());
  const int row_tiles = int(divide_up(rows, E::kRows)), out0 = int(blockIdx.y) * E::kOut;
  const ChunkTask task(int(blockIdx.x) / row_tiles, g.heads, chunks(g, g.queries));
  const Head s(g, task.problem(g.heads));
  const int chunk = task.chunk;
  const int row0 = int(blockIdx.x % row_tiles) * E::kRows;
  char *scratch = dynamic_shared_memory(), *tiles = scratch + E::scratch(false);
  const typename Sweep::Queries queries{
      {query_rows<const T>(g.query, s, g.head_dim), query_rows<const T>(g.out, s, g.value_dim)},
      chunk * kChunk,
      min(chunk * kChunk + kChunk, s.queries.count),
      tiles + 2 * Sweep::kRowTile};
  const bool dw_read = needs_dw(g, s), dkt_read = g.wanted.key;
  if (!s.has_query_pass() || row0 >= s.columns() || queries.begin >= queries.end || !(dw_read || dkt_read)) return;

  const A *kt = slice<A>(g.kt, s.n, rows, d), *w = slice<A>(g.w, s.n, rows, e);
  E::template load<E::kRows>(tiles, kt, int(d), row0, s.columns());
  E::template load<E::kRows>(tiles + Sweep::kRowTile, w, int(e), row0, s.columns());
  const auto a = E::template landmarks<E::kRows>(tiles, kt, int(d), row0, s.columns());
  const auto b = E::template landmarks<E::kRows>(tiles + Sweep::kRowTile, w, int(e), row0, s.columns());

  const Dropout dropout{g, s.n};
  typename E::Output dw, dkt;
  queries.start();
  for (int first = queries.begin; first < queries.end; first += E::kCols) {
    queries.next(first);
    typename E::Scores p = E::scores(a, queries.tile(0, first), scratch);
    typename E::Scores ds;
    if (dkt_read) ds = E::scores(b, queries.tile(1, first), scratch);
    Sweep::probabilities(g, s, dropout, row0, first, queries.end, p, ds,
                         tiles + 2 * Sweep::kRowTile + Sweep::Queries::kBytes);
    if (dw_read) E::template accumulate<2>(dw, p, queries.tile(1, first), out0, scratch);
    if (dkt_read) E::accumulate(dkt, ds, queries.tile(0, first), out0, scratch);
    Sweep::Queries::done();
  }

  const int64_t slot = (task.slot * g.heads + s.h) * rows;
  A *to_w = static_cast<A*>(g.dw_part) + slot * e, *to_kt = static_cast<A*>(g.dkt_part) + slot * d;
  for_each(dw, E::kRowsPerThread, [&](int i, int j, A& x) {
    const int row = row0 + E::row(i), column = out0 + E::column(j);
    if (row >= s.columns()) return;
    if (dw_read && column < e) to_w[row * e + column] = x;
    if (dkt_read && column < d) to_kt[row * d + column] = A(g.scale) * dkt.at(i, j);
  });
}

}  // namespace nystrom_ext::cuda
