// One sample's share of the problem: its valid tokens, its landmarks and the regime they decide (mathematics.md, 1).
#pragma once

#include "rows.h"

namespace {

enum class Regime {
  empty,          // S' = 0: O = 0
  exact_keys,     // S' <= m or S' <= pinned: every key is its own landmark, W = V; the query pass alone is exact
  exact_queries,  // L' <= m < S': every query is its own landmark; the key pass alone is exact attention
  nystrom,
};

// One (sample, head): problem n = b * heads + h.
struct Head {
  Regime regime;
  int64_t n, b, h, kv;             // kv: the key head of query head h
  int64_t queries, keys;           // L', S'
  int64_t first_query, first_key;  // where position 0 lies in an operand; not 0 in packed samples
  int64_t query_rows, key_rows;    // landmarks in use: rows of Qt, U and of Kt, W
  bool extended;                   // window or pinned tokens in the query pass: in the Nyström regime only
  int64_t window, pinned;          // 0 unless extended
  const int64_t *query_index, *key_index;
  const int64_t *query_offsets, *key_offsets;

  Head(const Problem& p, int64_t problem)
      : n(problem),
        b(problem / p.heads),
        h(problem % p.heads),
        kv(h / p.group()),
        queries(p.queries.count[b]),
        keys(p.keys.count[b]),
        first_query(p.queries.first ? p.queries.first[b] : 0),
        first_key(p.keys.first ? p.keys.first[b] : 0),
        query_rows(queries < p.landmarks ? queries : p.landmarks),
        key_rows(keys < p.landmarks ? keys : p.landmarks),
        extended(false),
        window(0),
        pinned(0),
        query_index(p.queries.index ? p.queries.index + b * p.queries.length : nullptr),
        key_index(p.keys.index ? p.keys.index + b * p.keys.length : nullptr),
        query_offsets(p.queries.offsets + b * (p.queries.landmarks + 1)),
        key_offsets(p.keys.offsets + b * (p.keys.landmarks + 1)) {
    regime = keys == 0                                 ? Regime::empty
             : keys <= p.landmarks || keys <= p.pinned ? Regime::exact_keys
             : queries <= p.landmarks                  ? Regime::exact_queries
                                                       : Regime::nystrom;
    if (regime == Regime::exact_keys) key_rows = keys;
    if (regime != Regime::nystrom || !p.extended()) return;
    extended = true;
    window = p.window < keys ? p.window : keys - 1;
    pinned = p.pinned;
  }

  // The segment that holds a rank, where queries and keys are the same tokens and in the Nyström regime.
  int64_t segment(int64_t rank) const { return ((rank + 1) * key_rows - 1) / keys; }

  // Rows of Kt and W in use: the pinned tokens follow the landmarks.
  int64_t columns() const { return key_rows + pinned; }

  // The key landmark's tokens: its segment without the pinned ones, c_J = end - begin of them, perhaps none.
  int64_t key_begin(int64_t j) const { return regime == Regime::exact_keys ? j : unpinned(key_offsets[j]); }
  int64_t key_end(int64_t j) const { return regime == Regime::exact_keys ? j + 1 : unpinned(key_offsets[j + 1]); }

 private:
  int64_t unpinned(int64_t rank) const { return rank < pinned ? pinned : rank; }
};

// Whether dW has a reader: the core, or the values that are landmarks themselves.
inline bool needs_dw(const Backward& g, const Head& s) {
  return s.regime == Regime::nystrom || (s.regime == Regime::exact_keys && g.wanted.value);
}

// The part of one head that an operand holds.
template <class T>
Rows<T> query_rows(const Operand& x, const Head& s, int64_t columns) {
  T* data = static_cast<T*>(x.data) + s.b * x.batch + s.first_query * x.token + s.h * x.head;
  return {data, x.token, x.feature, columns, s.query_index};
}
template <class T>
Rows<T> key_rows(const Operand& x, const Head& s, int64_t columns) {
  T* data = static_cast<T*>(x.data) + s.b * x.batch + s.first_key * x.token + s.kv * x.head;
  return {data, x.token, x.feature, columns, s.key_index};
}

// Problem n's slice of an m-sized buffer, null of one that is not there.
template <class A>
A* slice(void* buffer, int64_t n, int64_t rows, int64_t width = 1) {
  return buffer ? static_cast<A*>(buffer) + n * rows * width : nullptr;
}

// The chunk that a task of a pass stands for: tasks are numbered (slot, head), so that neighbours, which one thread
// takes, share memory pages where a token's heads lie side by side, as they do in the results.
struct ChunkTask {
  int64_t slot, sample, problem, chunk;
  ChunkTask(int64_t task, int64_t heads, const Slots& slots)
      : slot(task / heads),
        sample(slots.sample(slot)),
        problem(sample * heads + task % heads),
        chunk(slot - slots.begin(sample)) {}
};

// The place for the partial sums of one chunk of a head: the result's own for the first chunk, which later slots are
// counted without.
template <class A>
A* partial(void* result, void* later, const Head& s, int64_t heads, int64_t chunk, const Slots& slots, int64_t size) {
  if (chunk == 0) return slice<A>(result, s.n, size);
  return slice<A>(later, (slots.begin(s.b) + chunk - s.b - 1) * heads + s.h, size);
}

// A head's slice of a buffer with one number a query.
template <class A>
A* query_slice(void* buffer, const Problem& p, const Head& s) {
  const int64_t begin = p.queries.first ? p.heads * s.first_query + s.h * s.queries : s.n * p.queries.length;
  return static_cast<A*>(buffer) + begin;
}

}  // namespace
