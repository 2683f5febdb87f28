// The columns of the query pass that option window adds, and what is added to the landmarks' logits beside them
// (mathematics.md, section 6). Everything here is in units of log2 and by rank.
#pragma once

#include "philox.cuh"
#include "sweep.cuh"

namespace nystrom_ext::cuda {

// The engine of the sweeps with option window or pinned, which are kernels of their own: the plain ones pay nothing.
template <class Engine>
struct WithWindow : Engine {
  static constexpr bool kWindow = true;
};

// Shared memory of the two, after everything else of a block.
template <class E>
struct WindowMemory {
  using Stream = TokenStream<E, E::kCols, 2>;
  static constexpr int kBias = E::kRows * E::kCols * int(sizeof(typename E::Acc));
  static __host__ __device__ int bytes(const Problem& p) {
    return (p.extended() ? kBias : 0) + (p.window > 0 ? Stream::kBytes : 0);
  }
};

// log c_iJ + missed_sigma(i), with c_iJ the tokens of segment J outside of the window of i; 0 for a pinned token.
template <class A>
__device__ A landmark_bias(const Head& s, const A* missed, int query, int j) {
  if (j >= s.keys.rows) return A(0);
  const int begin = s.key_begin(j), end = s.key_end(j);
  int inside = 0;
  if (s.window > 0) inside = max(min(end, query + s.window + 1) - max(begin, query - s.window), 0);
  return A(kLog2e) * (log(A(end - begin - inside)) + missed[s.queries.segment(query)]);
}

// Adds the bias of every element of x, by way of this thread's own places in shared memory: a loop that is not unrolled
// keeps the arithmetic of ranks out of the registers. pair(row, column, query, j) names the element.
template <class E, class Pair>
__device__ void add_landmark_bias(const Forward& f, const Head& s, typename E::Scores& x, char* memory, int end,
                                  Pair pair) {
  using A = typename E::Acc;
  constexpr int kColumns = E::Scores::kColumns;
  const A* missed = slice<A>(f.missed, s.n, f.queries.landmarks);
  A* own = reinterpret_cast<A*>(memory) + threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < E::kRowsPerThread * kColumns; ++i) {
    int query = 0, j = 0;
    pair(E::row(i / kColumns), E::column(i % kColumns), query, j);
    own[i * E::kThreads] = query < end && j < s.columns() ? landmark_bias<A>(s, missed, query, j) : A(0);
  }
  for_each(x, E::kRowsPerThread, [&](int i, int j, A& v) { v += own[(i * kColumns + j) * E::kThreads]; });
}

// Whether the window of query i holds key j; a pinned key is a column of its own.
__device__ __forceinline__ bool in_window(const Head& s, int i, int j) {
  return j >= s.pinned && j - i <= s.window && i - j <= s.window;
}

// The dropout bits of window entries: columns follow those of Kt, from rank i - w on.
template <class E, class Pair>
__device__ uint32_t kept_in_window(const Dropout& dropout, const Head& s, Pair pair) {
  return dropout.template kept<E>([&](int r, int c, int& row, int& column) {
    int i = 0, j = 0;
    if (!pair(r, c, i, j) || !in_window(s, i, j)) return false;
    row = s.queries.position(i);
    column = s.columns() + j - i + s.window;
    return true;
  });
}

// Tokens that the windows of ranks first .. first + count - 1 reach, as a stream of tiles.
template <class E>
__device__ TokenStream<E, E::kCols, 2> around(const Rows<const typename E::T>& a, const Rows<const typename E::T>& b,
                                              const Head& s, int first, int count, char* memory) {
  return {{a, b}, max(first - s.window, 0), min(first + count + s.window, s.keys.count), memory};
}

// A query tile's window: logits of the keys in one tile, -infinity outside of the window.
template <class E>
struct Window {
  using T = typename E::T;
  using A = typename E::Acc;
  using Stream = typename WindowMemory<E>::Stream;

  const Forward& f;
  const Head& s;
  char* memory;  // the bias, then the stream

  __device__ Stream keys(int first, int end) const {
    return around<E>(key_rows<const T>(f.key, s, f.head_dim), key_rows<const T>(f.value, s, f.value_dim), s, first,
                     min(end - first, E::kRows), memory + WindowMemory<E>::kBias);
  }

  template <class Row>
  __device__ typename E::Scores logits(const Row& q, const Stream& keys, int tile, int first, int end,
                                       char* scratch) const {
    typename E::Scores x = E::scores(q, keys.tile(0, tile), scratch);
    const A scale = A(f.scale * kLog2e);
    for_each(x, E::kRowsPerThread, [&](int i, int j, A& v) {
      const int query = first + E::row(i), key = tile + E::column(j);
      v = query < end && key < keys.end && in_window(s, query, key) ? v * scale : A(-kInfinity);
    });
    return x;
  }

  __device__ uint32_t kept(const Dropout& dropout, const Stream& keys, int tile, int first, int end) const {
    return kept_in_window<E>(dropout, s, [&](int r, int c, int& i, int& j) {
      i = first + E::row(r);
      j = tile + E::column(c);
      return i < end && j < keys.end;
    });
  }

  // run(keys, tile) for the tiles of keys that the windows of the row tile at `first` reach.
  template <class Run>
  __device__ void for_each_tile(int first, int end, Run run) const {
    const Stream stream = keys(first, end);
    stream.start();
#pragma unroll 1
    for (int tile = stream.begin; tile < stream.end; tile += E::kCols) {
      stream.next(tile);
      run(stream, tile);
      stream.done();
    }
  }

  __device__ void add_bias(typename E::Scores& x, int first, int end, int column0) const {
    add_landmark_bias<E>(f, s, x, memory, end, [&](int row, int column, int& query, int& j) {
      query = first + row;
      j = column0 + column;
    });
  }
};

}  // namespace nystrom_ext::cuda
