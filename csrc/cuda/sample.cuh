// One (sample, head): its valid tokens, its landmarks and the regime they decide (mathematics.md, section 1).
#pragma once

#include "../problem.h"
#include "convert.cuh"

namespace nystrom_ext::cuda {

enum class Regime {
  empty,       // S' = 0: O = 0
  exact_keys,  // S' <= m, or all pinned: every key is its own landmark, W = V; the query pass alone is exact attention
  exact_queries,  // L' <= m < S': every query is its own landmark; the key pass alone is exact attention
  nystrom,
};

// The valid tokens of one sample. Without a mask there is no plan in memory: ranks are positions, and the borders of
// the segments follow from their formula. Packed samples need none either.
struct Side {
  int count;      // L' or S'
  int rows;       // landmarks in use
  int positions;  // L or S
  int64_t first;  // where position 0 lies in an operand; not 0 in packed samples
  const int64_t *index, *offsets;

  __device__ Side(const Tokens& t, int64_t b, int64_t m)
      : count(int(t.first   ? t.first[b + 1] - t.first[b]
                  : t.count ? t.count[b]
                            : t.length)),
        rows(int(count < m ? count : m)),
        positions(t.first ? count : int(t.length)),
        first(t.first ? t.first[b] : 0),
        index(t.index ? t.index + b * t.length : nullptr),
        offsets(t.offsets ? t.offsets + b * (t.landmarks + 1) : nullptr) {}

  __device__ int position(int rank) const { return index ? int(index[rank]) : rank; }
  __device__ int begin(int j) const { return int(offsets ? offsets[j] : int64_t(j) * count / rows); }
  __device__ int size(int j) const { return begin(j + 1) - begin(j); }

  // The segment that holds a rank.
  __device__ int segment(int rank) const {
    if (!offsets) return int(((rank + int64_t(1)) * rows - 1) / count);
    int low = 0, high = rows;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (offsets[middle] <= rank ? low : high) = middle;
    }
    return low;
  }
};

struct Head {
  int n, b, h, kv;  // n = b * heads + h; kv: the key head of query head h
  Side queries, keys;
  Regime regime;
  bool extended = false;  // window or pinned tokens in the query pass: in the Nyström regime only (section 6)
  int window = 0, pinned = 0;

  __device__ Head(const Problem& p, int64_t problem)
      : n(int(problem)),
        b(n / int(p.heads)),
        h(n % int(p.heads)),
        kv(h / int(p.group())),
        queries(p.queries, b, p.landmarks),
        keys(p.keys, b, p.landmarks),
        regime(keys.count == 0                                       ? Regime::empty
               : keys.count <= p.landmarks || keys.count <= p.pinned ? Regime::exact_keys
               : queries.count <= p.landmarks                        ? Regime::exact_queries
                                                                     : Regime::nystrom) {
    if (regime == Regime::exact_keys) keys.rows = keys.count, keys.offsets = nullptr;
    if (regime != Regime::nystrom || !p.extended()) return;
    extended = true;
    window = int(p.window < keys.count ? p.window : keys.count - 1);
    pinned = int(p.pinned);
  }

  // Which of the two attentions around the core the regime has.
  __device__ bool has_key_pass() const { return regime == Regime::nystrom || regime == Regime::exact_queries; }
  __device__ bool has_query_pass() const { return regime == Regime::nystrom || regime == Regime::exact_keys; }

  // Rows of Kt and W in use: the pinned tokens follow the landmarks.
  __device__ int columns() const { return keys.rows + pinned; }

  // The tokens of row j of Kt: its segment without the pinned ones, perhaps none; or the one pinned token.
  __device__ int key_begin(int j) const { return j < keys.rows ? max(keys.begin(j), pinned) : j - keys.rows; }
  __device__ int key_end(int j) const { return j < keys.rows ? max(keys.begin(j + 1), pinned) : j - keys.rows + 1; }
};

// Whether dW has a reader: the core, or the values that are landmarks themselves.
inline __device__ bool needs_dw(const Backward& g, const Head& s) {
  return s.regime == Regime::nystrom || (s.regime == Regime::exact_keys && g.wanted.value);
}

// The part of an operand that one head reads or writes, by rank.
template <class T>
struct Rows {
  T* data;
  int64_t token, feature;
  const int64_t* index;
  int columns;

  __device__ Rows by_position() const { return {data, token, feature, nullptr, columns}; }
  __device__ T* at(int position) const { return data + position * token; }
  __device__ T* row(int rank) const { return at(index ? int(index[rank]) : rank); }
};

template <class T>
__device__ Rows<T> rows(const Operand& x, int64_t b, int64_t h, int64_t columns, const Side& side) {
  T* data = static_cast<T*>(x.data) + b * x.batch + side.first * x.token + h * x.head;
  return {data, x.token, x.feature, side.index, int(columns)};
}
template <class T>
__device__ Rows<T> query_rows(const Operand& x, const Head& s, int64_t columns) {
  return rows<T>(x, s.b, s.h, columns, s.queries);
}
template <class T>
__device__ Rows<T> key_rows(const Operand& x, const Head& s, int64_t columns) {
  return rows<T>(x, s.b, s.kv, columns, s.keys);
}

// One chunk of one head's ranks: blocks and the places of partial sums are numbered (slot, head).
struct ChunkTask {
  int64_t slot;
  int sample, head, chunk;
  __device__ ChunkTask(int64_t task, int64_t heads, const Slots& slots)
      : slot(task / heads),
        sample(int(slots.sample(slot))),
        head(int(task % heads)),
        chunk(int(slot - slots.begin(sample))) {}
  __device__ int64_t problem(int64_t heads) const { return int64_t(sample) * heads + head; }
};

// The place of a head's first chunk among partial sums; the next ones follow at a distance of `heads`.
__device__ __forceinline__ int64_t first_part(const Problem& p, const Head& s, const Slots& slots) {
  return slots.begin(s.b) * p.heads + s.h;
}

// A head's slice of a buffer with one number a query.
template <class A>
__device__ A* query_slice(void* buffer, const Problem& p, const Head& s) {
  const int64_t begin =
      p.queries.first ? p.heads * s.queries.first + int64_t(s.h) * s.queries.count : s.n * p.queries.length;
  return static_cast<A*>(buffer) + begin;
}

// Problem n's slice of an m-sized buffer.
template <class A>
__device__ A* slice(void* buffer, int64_t n, int64_t rows, int64_t width = 1) {
  return static_cast<A*>(buffer) + n * rows * width;
}

}  // namespace nystrom_ext::cuda
