// The core's m x m matrices in square blocks, which the threads of a team share out.
//
// A block's elements are computed by one thread, in one order, whoever it is: the bits do not depend on the team.
#pragma once

#include "tile.h"

namespace {

constexpr int64_t kSide = 64;

// A matrix (m, ld): zeros from column m to `width`, nothing behind.
struct Grid {
  int64_t m, width, ld, blocks;
  explicit Grid(int64_t m) : m(m), width(padded(m)), ld(spread(m)), blocks(divide_up(m, kSide)) {}
  int64_t size() const { return m * ld; }
};

struct Block {
  int64_t i, j, rows, columns;  // first row and column; rows below m, columns below the width
  Block(const Grid& g, int64_t row, int64_t column)
      : i(row * kSide),
        j(column * kSide),
        rows(g.m - i < kSide ? g.m - i : kSide),
        columns(g.width - j < kSide ? g.width - j : kSide) {}
  bool diagonal() const { return i == j; }
};

// Shares out body(begin, end), which ranges cover steps 0 .. steps - 1, and returns when all are done.
template <class F>
void share(const Team& team, int64_t steps, const F& body) {
  if (team.run == nullptr) return body(0, steps);
  team.run(steps, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &body);
}

template <class F>
void for_blocks(const Team& team, const Grid& g, const F& run) {
  share(team, g.blocks * g.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) run(Block(g, t % g.blocks, t / g.blocks));
  });
}

// The blocks on and below the diagonal, column by column.
template <class F>
void for_lower(const Team& team, const Grid& g, const F& run) {
  share(team, g.blocks * (g.blocks + 1) / 2, [&](int64_t begin, int64_t end) {
    int64_t t = 0;
    for (int64_t j = 0; j < g.blocks; ++j) {
      for (int64_t i = j; i < g.blocks; ++i, ++t) {
        if (t >= begin && t < end) run(Block(g, i, j));
      }
    }
  });
}

// run(first row, rows), or the same of columns where `extent` is the width.
template <class F>
void for_rows(const Team& team, const Grid& g, const F& run) {
  share(team, g.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) run(t * kSide, Block(g, t, t).rows);
  });
}
template <class F>
void for_columns(const Team& team, const Grid& g, const F& run) {
  share(team, g.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) run(t * kSide, Block(g, t, t).columns);
  });
}

// The block of c = alpha a b, or plus c.
template <class A>
void block_product(const Grid& g, const Block& at, const A* a, const A* b, A* c, A alpha = A(1), bool add = false) {
  gemm<false>(at.rows, at.columns, g.m, a + at.i * g.ld, g.ld, b + at.j, g.ld, c + at.i * g.ld + at.j, g.ld, alpha,
              add);
}
// The same of a^T b, with a and b of `depth` rows.
template <class A>
void block_product_at(const Grid& g, const Block& at, int64_t depth, const A* a, const A* b, A* c, A alpha, bool add) {
  gemm<true>(at.rows, at.columns, depth, a + at.i, g.ld, b + at.j, g.ld, c + at.i * g.ld + at.j, g.ld, alpha, add);
}

// The block of c += alpha a.
template <class A>
void add_block(const Grid& g, const Block& at, A alpha, const A* a, A* c) {
  for (int64_t r = at.i; r < at.i + at.rows; ++r) {
    for (int64_t x = at.j; x < at.j + at.columns; ++x) c[r * g.ld + x] += alpha * a[r * g.ld + x];
  }
}

// c += diagonal I, of one block.
template <class A>
void add_diagonal(const Grid& g, const Block& at, A diagonal, A* c) {
  for (int64_t r = at.i; at.diagonal() && r < at.i + at.rows; ++r) c[r * g.ld + r] += diagonal;
}

// The block on the other side of the diagonal becomes the transpose of this one.
template <class A>
void mirror(const Grid& g, const Block& at, A* c) {
  if (at.diagonal()) return;
  transpose(c + at.i * g.ld + at.j, at.rows, at.columns, g.ld, c + at.j * g.ld + at.i, g.ld, A(1), padded(at.rows));
}

template <class A>
struct Transposed {
  alignas(64) A data[kSide * kSide];
  // Of a block; rows of kSide.
  Transposed(const Grid& g, int64_t i, int64_t j, int64_t rows, int64_t columns, const A* c) {
    transpose(c + i * g.ld + j, rows, columns, g.ld, data, kSide, A(1), padded(rows));
  }
};

// A block on the diagonal becomes the mean of itself and its transpose.
template <class A>
void symmetrize(const Grid& g, const Block& at, A* c) {
  const Transposed<A> other(g, at.i, at.j, at.rows, at.rows, c);
  for (int64_t r = 0; r < at.rows; ++r) {
    A* row = c + (at.i + r) * g.ld + at.j;
    for (int64_t x = 0; x < at.columns; ++x) row[x] = A(0.5) * (row[x] + other.data[r * kSide + x]);
  }
}

}  // namespace
