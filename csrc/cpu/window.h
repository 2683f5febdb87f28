// The window: exact scores of the tokens at distance <= w as columns beside the landmarks' (mathematics.md, section 6).
//
// A block of rows is cut into bands of kBandRows. With `start` the rank of its first row, column c of a band stands for
// rank start - w + c, and row t attends to columns t .. t + 2w; the others get -inf before the products are added. So
// everything is a small dense product with rows of the tokens around the block.
#pragma once

#include "philox.h"

namespace {

constexpr int64_t kBandRows = kWide ? 16 : 12;  // divides kBlock; a multiple of kRows

constexpr int64_t band_width(int64_t w) { return w > 0 ? padded(kBandRows + 2 * w) : 0; }

// Columns of the transposed tokens around a block: what its last band reads. An odd number of vectors, or rows would
// alias in L1.
constexpr int64_t around_width(int64_t w) {
  return w > 0 ? (padded(kBlock - kBandRows + band_width(w)) / kRowAlign | 1) * kRowAlign : 0;
}

// Calls run(first row, rows) for the bands of a block of n rows; without a window there are none.
template <class F>
void for_each_band(int64_t w, int64_t n, F run) {
  for (int64_t row = 0; w > 0 && row < n; row += kBandRows) run(row, n - row < kBandRows ? n - row : kBandRows);
}

// Keys and values of ranks first - w .. first + n + w - 1, or queries and output gradients.
template <class A>
struct Around {
  Tile<A> key, value;
};

template <class A>
struct WindowScratch {
  A *key, *value, *transposed, *transposed_value;  // the tokens around a block, and their transposes
  A* pattern;            // (kBandRows, band_width): 0 where row t attends to column c, else -inf
  A *log_counts, *bias;  // log c_J; the same + missed_sigma
  A* logarithms;         // log c for c = least_count .. least_count + 2w + 2
  A *lse, *delta;        // of the queries of, or around, a block
  A *scores, *dscores;   // one band of keys
  WindowScratch() = default;
  WindowScratch(Arena& arena, const Problem& p) {
    const int64_t w = p.window, around = w > 0 ? kBlock + 2 * w : 0, d = p.head_width(), e = p.value_width();
    const int64_t columns = p.extended() ? padded(p.columns()) : 0;
    key = arena.take<A>(around * d);
    value = arena.take<A>(around * e);
    transposed = arena.take<A>((d > e ? d : e) * around_width(w));
    transposed_value = arena.take<A>(e * around_width(w));
    pattern = arena.take<A>(kBandRows * band_width(w));
    log_counts = arena.take<A>(columns);
    bias = arena.take<A>(columns);
    logarithms = arena.take<A>(w > 0 ? 2 * w + 3 : 0);
    lse = arena.take<A>(p.extended() ? kBlock + around_width(w) : 0);
    delta = arena.take<A>(p.extended() ? kBlock + around_width(w) : 0);
    scores = arena.take<A>(kBandRows * band_width(w));
    dscores = arena.take<A>(kBandRows * band_width(w));
  }

  // What all blocks of one problem share.
  void prepare_pattern(const Head& s) const {
    const int64_t width = band_width(s.window);
    fill(pattern, kBandRows * width, -A(__builtin_inf()));
    for (int64_t t = 0; t < kBandRows && width > 0; ++t) fill(pattern + t * width + t, 2 * s.window + 1, A(0));
  }
  void prepare(const Head& s) const {
    prepare_pattern(s);
    for (int64_t i = 0; s.window > 0 && i < 2 * s.window + 3; ++i) logarithms[i] = log_count<A>(least_count(s) + i);
    for (int64_t j = 0; j < padded(s.columns()); ++j) {
      log_counts[j] = j < s.key_rows    ? log_count<A>(s.key_end(j) - s.key_begin(j))
                      : j < s.columns() ? A(0)
                                        : -A(__builtin_inf());
    }
  }

  // The fewest tokens that a window leaves of a segment without pinned ones.
  static int64_t least_count(const Head& s) {
    const int64_t least = s.keys / s.key_rows - (2 * s.window + 1);
    return least < 0 ? 0 : least;
  }
};

// Ranks first - w .. first + n + w - 1 of x, zeros for those outside 0 .. total - 1.
template <class T>
Tile<Acc<T>> read_around(const Rows<T>& x, int64_t first, int64_t n, int64_t w, int64_t total, Acc<T>* scratch) {
  using A = Acc<T>;
  if (first >= w && first + n + w <= total) return x.read(first - w, n + 2 * w, scratch);
  const int64_t ld = padded(x.columns);
  for (int64_t i = 0; i < n + 2 * w; ++i) {
    const int64_t rank = first - w + i;
    if (rank < 0 || rank >= total) {
      fill(scratch + i * ld, ld, A(0));
    } else {
      x.read(x.position(rank), scratch + i * ld);
    }
  }
  return {scratch, ld};
}

template <class T>
Around<Acc<T>> read_keys_around(const Problem& p, const Head& s, int64_t first, int64_t n,
                                const WindowScratch<Acc<T>>& scratch) {
  if (s.window == 0) return {};
  return {read_around(key_rows<T>(p.key, s, p.head_dim), first, n, s.window, s.keys, scratch.key),
          read_around(key_rows<T>(p.value, s, p.value_dim), first, n, s.window, s.keys, scratch.value)};
}

// Bands (n, ld) (+)= alpha x y^T: x the block's rows, y the rows around it. The factor comes last, so that the backward
// pass, which finds a score with the roles of x and y exchanged, finds the same bits.
template <class A>
void window_products(const Head& s, int64_t n, int64_t columns, Tile<A> x, Tile<A> y, A alpha,
                     const WindowScratch<A>& scratch, A* bands, int64_t ld, bool add) {
  if (s.window == 0) return;
  const int64_t width = band_width(s.window), around = around_width(s.window);
  transpose(y.data, n + 2 * s.window, columns, y.ld, scratch.transposed, around);
  for_each_band(s.window, n, [&](int64_t row, int64_t rows) {
    gemm<false>(rows, width, columns, x.data + row * x.ld, x.ld, scratch.transposed + row, around, bands + row * ld, ld,
                alpha, add);
  });
}

// What is added to the landmarks' scores of one query after the other: log c_iJ + missed_sigma(i), with c_iJ the tokens
// of segment J outside of the window of i, and 0 for the pinned tokens.
template <class A>
class LandmarkBias {
 public:
  LandmarkBias(const Head& s, const A* missed, const WindowScratch<A>& scratch, int64_t first)
      : s_(s), missed_(missed), scratch_(scratch), least_(scratch.least_count(s)), touched_(s.segment(low(first))) {
    enter(s.segment(first));
  }

  // Ranks in ascending order from `first` on.
  void write(int64_t rank, A* row) {
    while (s_.query_offsets[segment_ + 1] <= rank) enter(segment_ + 1);
    const int64_t m = padded(s_.columns());
    for (int64_t j = 0; j < m; j += Simd<A>::width) store(row + j, load(scratch_.bias + j));
    if (s_.window == 0) return;
    const int64_t from = low(rank), to = rank + s_.window < s_.keys ? rank + s_.window + 1 : s_.keys;
    while (s_.key_end(touched_) <= from) ++touched_;
    for (int64_t j = touched_; j < s_.key_rows && s_.key_begin(j) < to; ++j) {
      const int64_t begin = s_.key_begin(j), end = s_.key_end(j);
      const int64_t inside = (end < to ? end : to) - (begin < from ? from : begin);
      row[j] = logarithm(end - begin - inside) + missed_[segment_];
    }
  }

 private:
  const Head& s_;
  const A* missed_;
  const WindowScratch<A>& scratch_;
  int64_t least_, segment_, touched_;  // segment: sigma(i); touched: the first segment that the window reaches into

  // The window's first token that is not pinned.
  int64_t low(int64_t rank) const { return rank - s_.window < s_.pinned ? s_.pinned : rank - s_.window; }

  void enter(int64_t segment) {
    segment_ = segment;
    for (int64_t j = 0; j < padded(s_.columns()); ++j) {
      scratch_.bias[j] = scratch_.log_counts[j] + (j < s_.key_rows ? missed_[segment] : A(0));
    }
  }

  A logarithm(int64_t count) const {
    return count < least_ ? log_count<A>(count) : scratch_.logarithms[count - least_];  // fewer: pinned tokens
  }
};

// -inf in the columns of one band that its rows do not attend to, 0 elsewhere. start: rank of its first row.
template <class A>
void mask_band(const Head& s, int64_t start, int64_t rows, const A* pattern, A* band, int64_t ld) {
  const int64_t width = band_width(s.window), origin = start - s.window;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < width; c += Simd<A>::width) store(band + t * ld + c, load(pattern + t * width + c));
    if (origin < s.pinned)
      fill(band + t * ld, s.pinned - origin < width ? s.pinned - origin : width, -A(__builtin_inf()));
    if (origin + width > s.keys) fill(band + t * ld + s.keys - origin, origin + width - s.keys, -A(__builtin_inf()));
  }
}

// Logits of one block, (n, padded(columns) + band_width): landmarks, pinned tokens, window. kt: s Kt^T.
template <class A>
void window_scores(const Forward& f, const Head& s, int64_t first, int64_t n, Tile<A> q, const Around<A>& near,
                   const A* kt, const WindowScratch<A>& scratch, A* scores) {
  const int64_t m = padded(s.columns()), ld = m + band_width(s.window);
  LandmarkBias<A> bias(s, slice<A>(f.missed, s.n, f.queries.landmarks), scratch, first);
  for (int64_t i = 0; i < n; ++i) {
    // The next block's values; its keys are asked for by `transpose`.
    if (s.window > 0) prefetch_row(near.value.data + (i + kBlock + 2 * s.window) * near.value.ld, f.value_dim);
    bias.write(first + i, scores + i * ld);
  }
  for_each_band(s.window, n, [&](int64_t row, int64_t rows) {
    mask_band(s, first + row, rows, scratch.pattern, scores + row * ld + m, ld);
  });
  gemm<false>(n, m, f.head_dim, q.data, q.ld, kt, m, scores, ld, A(1), true);
  window_products(s, n, f.head_dim, q, near.key, A(f.scale), scratch, scores + m, ld, true);
}

// What the key pass needs of the block's queries: LSE1, delta1.
template <class A>
void keep_row_statistics(const Backward& g, const Head& s, int64_t first, int64_t n, const A* lse, const A* delta) {
  if (s.window == 0 || !g.wanted.tokens()) return;
  std::memcpy(query_slice<A>(g.lse1, g, s) + first, lse, size_t(n) * sizeof(A));
  if (g.wanted.key) std::memcpy(query_slice<A>(g.delta1, g, s) + first, delta, size_t(n) * sizeof(A));
}

// dmissed_sigma += the sums over the landmarks of the rows of dS1 in segment sigma.
template <class A>
void sum_landmark_columns(const Head& s, int64_t first, int64_t n, const A* ds, int64_t ld, A* dmissed) {
  constexpr int W = Simd<A>::width;
  int64_t segment = s.segment(first);
  for (int64_t i = 0; i < n; ++segment) {
    const int64_t end = s.query_offsets[segment + 1] - first;
    Vec<A> total = {};
    A rest = 0;
    for (; i < n && i < end; ++i) {
      const A* row = ds + i * ld;
      int64_t j = 0;
      for (; j + W <= s.key_rows; j += W) total += load(row + j);
      for (; j < s.key_rows; ++j) rest += row[j];
    }
    dmissed[segment] += sum<A>(total) + rest;
  }
}

// Columns of the dropout's counters: landmarks and pinned tokens as in Kt, then the window from rank i - w on.
template <class A>
void drop_window_rows(const Dropout& dropout, const Head& s, int64_t first, int64_t n, A* x) {
  const int64_t m = padded(s.columns()), ld = m + band_width(s.window);
  drop_rows(dropout, s, first, n, x, ld);
  for (int64_t i = 0; i < n && s.window > 0; ++i) {
    const int64_t row = s.query_index ? s.query_index[first + i] : first + i;
    dropout.apply(row, nullptr, s.columns(), 2 * s.window + 1, x + i * ld + m + i % kBandRows, 1);
  }
}

}  // namespace
