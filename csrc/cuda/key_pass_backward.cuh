// Stage `key_pass`, backward (mathematics.md, section 3), two sweeps in one launch: blocks by keys give dK and dV,
// which are final, and dconv; blocks by landmarks give dQt = s dS3 K over one chunk of keys. Each as far as it is
// wanted.
#pragma once

#include "columns.cuh"
#include "convolution.cuh"
#include "key_pass.cuh"
#include "window.cuh"

namespace nystrom_ext::cuda {

struct KeyPassBackwardParameters : Backward {
  int column_slots;
  int64_t key_blocks;  // blocks 0 .. key_blocks - 1 sweep by keys, the others by landmarks
  void* dqt_part;      // (chunks of keys, H, queries.landmarks, head_width)
  void* dconv_part;    // (row chunks of keys, H, output tiles, taps)
};

template <class E>
struct KeySweep {
  using T = typename E::T;
  using A = typename E::Acc;
  using Keys = TokenStream<E, E::kRows, 2>;

  static __host__ __device__ int shared(const Problem& p) { return E::scratch(p.taps > 0) + Keys::kBytes; }
  static __host__ __device__ int tap_bytes(const Problem& p) {  // after the column tiles
    return int(p.group() * tap_rows(E{}) * p.taps * int64_t(sizeof(A)));
  }

  const KeyPassBackwardParameters& g;
  const Keys& keys;
  char* scratch;
  int out0;

  // One query head's share of a row tile of dK and dV through P3.
  __device__ void add(const Head& s, ColumnTiles<E>& columns, int first, typename E::Output& dk,
                      typename E::Output& dv) const {
    const Dropout dropout{g, s.n};
    const A* lse = slice<A>(g.lse, s.n, g.queries.landmarks);
    const A* delta = g.wanted.key ? slice<A>(g.delta, s.n, g.queries.landmarks) : nullptr;
    const A scale = A(g.scale * kLog2e);
    for (int c = 0; c < columns.tiles(); ++c) {
      columns.load(c);
      typename E::Scores p = E::scores(keys.tile(0, first), columns.first(c), scratch);
      typename E::Scores ds;
      if (g.wanted.key) ds = E::scores(keys.tile(1, first), columns.second(c), scratch);
      const ColumnStatistics<A> statistics{lse, delta, c * E::kCols, s.queries.rows, A(kLog2e)};
      const auto kept = [&] {
        return dropout.kept<E>([&](int i, int j, int& row, int& column) {
          return KeyPass<E>::entry(s, c * E::kCols + E::column(j), first + E::row(i), row, column);
        });
      };
      const auto live = [&](int i, int) { return !E::kWindow || first + E::row(i) >= s.pinned; };  // others: not in P3
      differentiate_columns<E>(p, ds, statistics, scale, dropout, KeyPass<E>::drops(dropout, s), kept, live);
      if (g.wanted.value) E::template accumulate<2>(dv, p, columns.second(c), out0, scratch);
      if (g.wanted.key) E::accumulate(dk, ds, columns.first(c), out0, scratch);
    }
  }

  // The share of the windows that hold a key: columns are the queries around, whose LSE1 and delta1 are known.
  __device__ void add_window(const Head& s, int first, char* memory, typename E::Output& dk,
                             typename E::Output& dv) const {
    const Dropout dropout{g, s.n};
    const A* lse = query_slice<A>(g.lse1, g, s);
    const A* delta = g.wanted.key ? query_slice<A>(g.delta1, g, s) : nullptr;
    const A scale = A(g.scale * kLog2e);
    const auto queries =
        around<E>(query_rows<const T>(g.query, s, g.head_dim), query_rows<const T>(g.out, s, g.value_dim), s, first,
                  min(keys.end - first, E::kRows), memory);
    queries.start();
#pragma unroll 1
    for (int tile = queries.begin; tile < queries.end; tile += E::kCols) {
      queries.next(tile);
      typename E::Scores p = E::scores(keys.tile(0, first), queries.tile(0, tile), scratch);
      typename E::Scores ds;
      if (g.wanted.key) ds = E::scores(keys.tile(1, first), queries.tile(1, tile), scratch);
      const auto kept = [&] {
        return kept_in_window<E>(dropout, s, [&](int r, int c, int& i, int& j) {
          i = tile + E::column(c);
          j = first + E::row(r);
          return i < queries.end && j < keys.end;
        });
      };
      const auto live = [&](int i, int j) { return in_window(s, tile + E::column(j), first + E::row(i)); };
      const ColumnStatistics<A> statistics{lse, delta, tile, queries.end, A(1)};
      differentiate_columns<E>(p, ds, statistics, scale, dropout, dropout.on(), kept, live);
      if (g.wanted.value) E::template accumulate<2>(dv, p, queries.tile(1, tile), out0, scratch);
      if (g.wanted.key) E::accumulate(dk, ds, queries.tile(0, tile), out0, scratch);
      queries.done();
    }
  }

  // What reaches keys and values through the key landmarks: dKt_j / |segment j|, or all of dKt and dW where a key is
  // its own landmark.
  __device__ void add_landmarks(const Head& s, int first, typename E::Output& dk, typename E::Output& dv) const {
    const int rows = int(g.columns()), d = int(g.head_width()), e = int(g.value_width());
    const A *dkt = slice<A>(g.dkt, s.n, rows, d), *dw = slice<A>(g.dw, s.n, rows, e);
#pragma unroll
    for (int i = 0; i < E::kRowsPerThread; ++i) {
      const int rank = first + E::row(i);
      if (rank >= keys.end) continue;
      const bool pinned = E::kWindow && rank < s.pinned, own = s.regime == Regime::exact_keys || pinned;
      const int row = pinned ? s.keys.rows + rank : s.keys.segment(rank);
      const A share = A(1) / A(s.key_end(row) - s.key_begin(row));
#pragma unroll
      for (int j = 0; j < E::Output::kColumns; ++j) {
        const int column = out0 + E::column(j);
        if (g.wanted.key && column < d) dk.at(i, j) += share * dkt[row * d + column];
        if (g.wanted.value && own && column < e) dv.at(i, j) += dw[row * e + column];
      }
    }
  }
};

template <class E>
__device__ void key_pass_backward_by_keys(const KeyPassBackwardParameters& g) {
  using T = typename E::T;
  using A = typename E::Acc;
  using Sweep = KeySweep<E>;
  const int group = int(g.group());
  const ChunkTask task(blockIdx.x, g.kv_heads, row_chunks(g, g.keys));
  const Head shared(g, task.problem(g.kv_heads) * group);
  const int begin = task.chunk * kRowChunk, end = min(begin + kRowChunk, shared.keys.count);
  if (begin >= end) return;

  char* scratch = dynamic_shared_memory();
  const typename Sweep::Keys keys{
      {key_rows<const T>(g.key, shared, g.head_dim), key_rows<const T>(g.value, shared, g.value_dim)},
      begin,
      end,
      scratch + E::scratch(g.taps > 0)};
  const Sweep sweep{g, keys, scratch, int(blockIdx.y) * E::kOut};
  char* tiles = scratch + Sweep::shared(g);
  const int own_taps = tap_rows(E{}) * int(g.taps);
  A* taps = reinterpret_cast<A*>(tiles + 2 * g.column_slots * ColumnTiles<E>::kTile);
  const Wanted wanted = g.wanted;
  for (int i = threadIdx.x; wanted.conv && i < group * own_taps; i += E::kThreads) taps[i] = 0;
  char* near = reinterpret_cast<char*>(taps) + round_up(Sweep::tap_bytes(g), 16);

  const int rows = int(g.queries.landmarks), d = int(g.head_width()), e = int(g.value_width());
  int loaded = 0;
  keys.start();
  for (int first = begin; first < end; first += E::kRows) {
    const int count = min(end - first, E::kRows);
    keys.next(first);
    typename E::Output dk, dv;
    for (int h = 0; wanted.tokens() && h < group; ++h) {
      const Head s(g, shared.n + h);
      if (!s.has_key_pass()) continue;
      ColumnTiles<E> columns{{slice<A>(g.qt, s.n, rows, d), int(d), s.queries.rows},
                             {slice<A>(g.du, s.n, rows, e), int(e), s.queries.rows},
                             tiles,
                             g.column_slots,
                             group == 1 ? loaded : 0};
      sweep.add(s, columns, first, dk, dv);
      loaded = columns.loaded;
      if (E::kWindow && s.window > 0) sweep.add_window(s, first, near, dk, dv);
    }
    for_each(dk, E::kRowsPerThread, [&](int, int, A& x) { x *= A(g.scale); });
    for (int h = 0; wanted.tokens() && h < group; ++h) {
      const Head s(g, shared.n + h);
      if (s.has_query_pass()) sweep.add_landmarks(s, first, dk, dv);
    }
    if (wanted.key) E::store(dk, key_rows<T>(g.dkey, shared, g.head_dim), first, count, sweep.out0);
    for (int h = 0; h < group && g.taps && (wanted.value || wanted.conv); ++h) {
      convolve_backward(E{}, wanted, dv, keys.tile(1, first), gradient_convolution<T>(g, shared, shared.h + h),
                        shared.keys, first, count, sweep.out0, taps + h * own_taps, scratch);
    }
    if (wanted.value) E::store(dv, key_rows<T>(g.dvalue, shared, g.value_dim), first, count, sweep.out0);
    __syncthreads();  // the tile may be refilled; the taps are complete
  }

  for (int i = threadIdx.x; wanted.conv && i < group * int(g.taps); i += E::kThreads) {
    const int h = i / int(g.taps), t = i % int(g.taps);
    A sum = 0;
    for (int r = 0; r < tap_rows(E{}); ++r) sum += taps[h * own_taps + r * g.taps + t];
    const int64_t slot = (task.slot * g.heads + shared.h + h) * gridDim.y + blockIdx.y;
    static_cast<A*>(g.dconv_part)[slot * g.taps + t] = sum;
  }
}

// Shared memory of a block by landmarks.
template <class E>
constexpr int kByLandmarksShared = KeyPass<E>::kShared + KeyPass<E>::kRowTile;

template <class E>
__device__ void key_pass_backward_by_landmarks(const KeyPassBackwardParameters& g, int64_t block) {
  using T = typename E::T;
  using A = typename E::Acc;
  using Pass = KeyPass<E>;
  const int rows = int(g.queries.landmarks);
  const int d = int(g.head_width()), e = int(g.value_width());
  const int row_tiles = int(divide_up(rows, E::kRows)), out0 = int(blockIdx.y) * E::kOut;
  const ChunkTask task(block / row_tiles, g.heads, chunks(g, g.keys));
  const Head s(g, task.problem(g.heads));
  const int chunk = task.chunk;
  const int row0 = int(block % row_tiles) * E::kRows;
  char *scratch = dynamic_shared_memory(), *tiles = scratch + E::scratch(false);
  const typename Pass::Keys keys{{key_rows<const T>(g.key, s, g.head_dim), key_rows<const T>(g.value, s, g.value_dim)},
                                 max(chunk * kChunk, s.pinned),
                                 min(chunk * kChunk + kChunk, s.keys.count),
                                 tiles + 2 * Pass::kRowTile};
  if (!s.has_key_pass() || row0 >= s.queries.rows || keys.begin >= keys.end) return;

  const A *qt = slice<A>(g.qt, s.n, rows, d), *du = slice<A>(g.du, s.n, rows, e);
  E::template load<E::kRows>(tiles, qt, int(d), row0, s.queries.rows);
  E::template load<E::kRows>(tiles + Pass::kRowTile, du, int(e), row0, s.queries.rows);
  const auto a = E::template landmarks<E::kRows>(tiles, qt, int(d), row0, s.queries.rows);
  const auto b = E::template landmarks<E::kRows>(tiles + Pass::kRowTile, du, int(e), row0, s.queries.rows);

  const Dropout dropout{g, s.n};
  A lse[E::kRowsPerThread], delta[E::kRowsPerThread], excess[E::kRowsPerThread] = {};
#pragma unroll
  for (int i = 0; i < E::kRowsPerThread; ++i) {
    const int row = row0 + E::row(i);
    const bool valid = row < s.queries.rows;
    lse[i] = valid ? slice<A>(g.lse, s.n, rows)[row] * A(kLog2e) : A(kInfinity);
    delta[i] = valid ? slice<A>(g.delta, s.n, rows)[row] : A(0);
  }
  typename E::Output dqt;
  keys.start();
  for (int first = keys.begin; first < keys.end; first += E::kCols) {
    keys.next(first);
    typename E::Scores p = Pass::logits(g, a, keys, first, scratch);
    typename E::Scores ds = E::scores(b, keys.tile(1, first), scratch);
    Pass::drop(dropout, s, row0, first, ds);
    for_each(ds, E::kRowsPerThread, [&](int i, int j, A& x) {
      x = probability<E>(p.at(i, j), lse[i]) * (x - delta[i]);
      excess[i] += E::rounded(x) - x;
    });
    E::accumulate(dqt, ds, keys.tile(0, first), out0, scratch);
    Pass::Keys::done();
  }

  // What rounding adds to the sum of a row is taken from the landmark of the same number (mathematics.md, section 4).
  const A* kt = slice<A>(g.kt, s.n, g.columns(), d);
  A* to = static_cast<A*>(g.dqt_part) + (task.slot * g.heads + s.h) * rows * d;
#pragma unroll
  for (int i = 0; i < E::kRowsPerThread; ++i) {
    const int row = row0 + E::row(i);
    const A sum = E::row_sum(excess[i]);
    if (row >= s.queries.rows) continue;
#pragma unroll
    for (int j = 0; j < E::Output::kColumns; ++j) {
      const int column = out0 + E::column(j);
      if (column < d) to[row * d + column] = A(g.scale) * (dqt.at(i, j) - sum * kt[row * d + column]);
    }
  }
}

template <class K, class L>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    key_pass_backward(const __grid_constant__ KeyPassBackwardParameters g) {
  if (blockIdx.x < g.key_blocks) {
    key_pass_backward_by_keys<K>(g);
  } else {
    key_pass_backward_by_landmarks<L>(g, blockIdx.x - g.key_blocks);
  }
}

}  // namespace nystrom_ext::cuda
