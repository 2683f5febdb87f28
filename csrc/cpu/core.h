// Stage `core`: A = softmax(s Qt Kt^T), Z by Newton-Schulz from A^T / c, W = Z U (mathematics.md, section 2).
//
// Six iterations are a spectral filter and not an inverse; never replace them by a better inverse. Z_k is A^T times a
// polynomial in A A^T, so X_k = A Z_k and its polynomials are symmetric in exact arithmetic: of the polynomials one
// triangle of blocks is computed and mirrored. The last iteration is applied to U, without its Z. The reverse pass is
// in core_backward.h, the blocks in blocks.h.
#pragma once

#include "blocks.h"

namespace {

// m where some sample can be in the Nyström regime, else 0: a large m that only asks for exactness costs no scratch.
inline int64_t core_size(const Problem& p) {
  return p.queries.length > p.landmarks && p.keys.length > p.landmarks ? p.landmarks : 0;
}

// Z_k and what its iteration computes on the way to Z_{k+1}: X = A Z_k, T3 = 13 I - X T2, T2 = 15 I - X (7 I - X).
template <class A>
struct Iterate {
  A *z, *x, *t3;
};

template <class A>
struct CoreScratch {
  Grid grid{0};
  A *kt, *a, *t2, *column, *z, *x, *u, *u_next;
  int64_t stride;  // elements from one X and T3 to the next
  CoreScratch() = default;

  // Keeps every X and T3 for the reverse pass, or only the last ones; all have room for two Z.
  CoreScratch(Arena& arena, const Problem& p, bool keep_all) : grid(core_size(p)) {
    const int64_t size = grid.size(), m = grid.m;
    stride = keep_all ? 2 * size : 0;
    kt = arena.take<A>(p.head_dim * grid.ld);
    a = arena.take<A>(size);
    t2 = arena.take<A>(size);
    column = arena.take<A>(grid.ld);
    z = arena.take<A>(2 * size);
    x = arena.take<A>((keep_all ? p.iterations : 1) * 2 * size);
    u = arena.take<A>(m * p.value_width());
    u_next = arena.take<A>(m * p.value_width());
  }

  Iterate<A> iterate(int64_t k) const {
    A* steps = x + k * stride;
    return {z + k % 2 * grid.size(), steps, steps + grid.size()};
  }
};

// A of one problem.
template <class A>
void similarity(const Forward& f, const Head& s, const CoreScratch<A>& scratch, const Team& team) {
  const Grid g = scratch.grid;
  const int64_t width = f.head_width();
  const A* qt = slice<A>(f.qt, s.n, f.queries.landmarks, width);
  transpose(slice<A>(f.kt, s.n, f.columns(), width), g.m, f.head_dim, width, scratch.kt, g.ld, A(f.scale));
  for_rows(team, g, [&](int64_t i, int64_t rows) {
    A* a = scratch.a + i * g.ld;
    gemm<false>(rows, g.width, f.head_dim, qt + i * width, width, scratch.kt, g.ld, a, g.ld);
    for (int64_t j = 0; s.pinned > 0 && s.key_end(j) <= s.pinned; ++j) {  // a segment of pinned tokens is no column
      for (int64_t r = 0; r < rows; ++r) a[r * g.ld + j] = A(-__builtin_inf());
    }
    softmax_rows(a, rows, g.m, g.width, g.ld);
  });
}

// c = (largest row sum) (largest column sum) of A, and the column that attains it. Rows of a softmax sum to 1.
template <class A>
A coefficient(const CoreScratch<A>& scratch, int64_t* argmax) {
  const Grid g = scratch.grid;
  fill(scratch.column, g.width, A(0));
  for (int64_t i = 0; i < g.m; ++i) add(scratch.column, scratch.a + i * g.ld, g.width);
  *argmax = 0;
  for (int64_t j = 1; j < g.m; ++j) {
    if (scratch.column[j] > scratch.column[*argmax]) *argmax = j;
  }
  return scratch.column[*argmax];
}

// A, c and Z_0; returns c. `given`: the global c, or null for the head's own.
template <class A>
A start_core(const Forward& f, const Head& s, const double* given, const CoreScratch<A>& scratch, const Team& team,
             int64_t* argmax) {
  const Grid g = scratch.grid;
  similarity(f, s, scratch, team);
  const A own = coefficient(scratch, argmax), c = given ? A(*given) : own;
  for_rows(team, g, [&](int64_t i, int64_t rows) {
    transpose(scratch.a + i * g.ld, rows, g.m, g.ld, scratch.z + i, g.ld, A(1) / c, padded(rows));
  });
  return c;
}

// X = A Z_k, both triangles: how they differ is what the next iterate corrects. Mirrored, landmarks that nearly repeat
// have errors of 6e-5.
template <class A>
void image(const CoreScratch<A>& scratch, const Team& team, const Iterate<A>& it) {
  const Grid g = scratch.grid;
  for_blocks(team, g, [&](const Block& b) { block_product(g, b, scratch.a, it.z, it.x); });
}

// T3 from X, by way of T2 = 15 I - 7 X + X X.
template <class A>
void third_factor(const CoreScratch<A>& scratch, const Team& team, const Iterate<A>& it) {
  const Grid g = scratch.grid;
  for_lower(team, g, [&](const Block& b) {
    block_product(g, b, it.x, it.x, scratch.t2);
    add_block(g, b, A(-7), it.x, scratch.t2);
    add_diagonal(g, b, A(15), scratch.t2);
    mirror(g, b, scratch.t2);
  });
  for_lower(team, g, [&](const Block& b) {
    block_product(g, b, it.x, scratch.t2, it.t3, A(-1));
    add_diagonal(g, b, A(13), it.t3);
    mirror(g, b, it.t3);
  });
}

// Z_{k+1} = Z_k T3 / 4.
template <class A>
void next_iterate(const CoreScratch<A>& scratch, const Team& team, const Iterate<A>& it, A* next) {
  const Grid g = scratch.grid;
  for_blocks(team, g, [&](const Block& b) { block_product(g, b, it.z, it.t3, next, A(0.25)); });
}

// W = Z_iterations U, of which the last iteration is Z (13 U - X (15 U - X (7 U - X U))) / 4.
template <class A>
void apply_core(const CoreScratch<A>& scratch, const Team& team, int64_t iterations, const A* u, int64_t e, A* w) {
  const Grid g = scratch.grid;
  const auto product = [&](const A* matrix, const A* x, A factor, A scale, A* to) {  // factor U + scale matrix x
    for_rows(team, g, [&](int64_t i, int64_t rows) {
      for (int64_t r = i * e; factor != 0 && r < (i + rows) * e; ++r) to[r] = factor * u[r];
      gemm<false>(rows, e, g.m, matrix + i * g.ld, g.ld, x, e, to + i * e, e, scale, factor != 0);
    });
  };
  if (iterations == 0) return product(scratch.z, u, A(0), A(1), w);
  for (int64_t k = 0; k + 1 < iterations; ++k) {
    const Iterate<A> it = scratch.iterate(k);
    image(scratch, team, it);
    third_factor(scratch, team, it);
    next_iterate(scratch, team, it, scratch.iterate(k + 1).z);
  }
  const Iterate<A> last = scratch.iterate(iterations - 1);
  image(scratch, team, last);
  product(last.x, u, A(7), A(-1), scratch.u);
  product(last.x, scratch.u, A(15), A(-1), scratch.u_next);
  product(last.x, scratch.u_next, A(13), A(-1), scratch.u);
  product(last.z, scratch.u, A(0), A(0.25), w);
}

// t2 = s Qt Kt^T + log c_J, the landmarks' share of the logits of mathematics.md, section 6; kt is from `similarity`.
template <class A>
void counted_scores(const Forward& f, const Head& s, const CoreScratch<A>& scratch) {
  const Grid g = scratch.grid;
  const int64_t width = f.head_width();
  for (int64_t j = 0; j < g.width; ++j) {
    const A count = j < g.m ? log_count<A>(s.key_end(j) - s.key_begin(j)) : -A(__builtin_inf());
    for (int64_t i = 0; i < g.m; ++i) scratch.t2[i * g.ld + j] = count;
  }
  gemm<false>(g.m, g.width, f.head_dim, slice<A>(f.qt, s.n, f.queries.landmarks, width), width, scratch.kt, g.ld,
              scratch.t2, g.ld, A(1), true);
}

// missed = LSE3 - logsumexp_J(s Qt Kt^T + log c_J).
template <class A>
void missed_mass(const Forward& f, const Head& s, const CoreScratch<A>& scratch) {
  const Grid g = scratch.grid;
  const int64_t rows = f.queries.landmarks;
  counted_scores(f, s, scratch);
  A* missed = slice<A>(f.missed, s.n, rows);
  softmax_rows<true>(scratch.t2, g.m, g.m, g.width, g.ld, missed);
  for (int64_t i = 0; i < g.m; ++i) missed[i] = slice<A>(f.lse, s.n, rows)[i] - missed[i];
}

// Task: problem. c[n] = the head's own coefficient; 0 outside the Nyström regime. For option "global" only.
template <class T>
void core_coefficient(const Forward& f, double* c, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<CoreScratch<A>> scratch(static_cast<const Problem&>(f), false);
  int64_t argmax;
  for (int64_t n = begin; n < end; ++n) {
    const Head s(f, n);
    c[n] = 0;
    if (s.regime != Regime::nystrom) continue;
    similarity(f, s, *scratch, Team{});
    c[n] = coefficient(*scratch, &argmax);
  }
}

// Task: problem. c: one coefficient for all problems, or null for each head's own. The team shares each task's steps.
template <class T>
void core(const Forward& f, const double* c, const Team& team, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<CoreScratch<A>> scratch(static_cast<const Problem&>(f), false);
  const int64_t m = f.landmarks, width = f.value_width();
  for (int64_t n = begin; n < end; ++n) {
    const Head s(f, n);
    A* w = slice<A>(f.w, n, f.columns(), width);
    const Rows<T> value = key_rows<T>(f.value, s, f.value_dim);
    if (s.regime == Regime::exact_keys) {
      for (int64_t j = 0; j < s.key_rows; ++j) value.read(value.position(j), w + j * width);
    }
    if (s.regime != Regime::nystrom) continue;
    int64_t argmax;
    start_core(f, s, c, *scratch, team, &argmax);
    apply_core(*scratch, team, f.iterations, slice<A>(f.u, n, f.queries.landmarks, width), width, w);
    for (int64_t r = 0; r < s.pinned; ++r) value.read(value.position(r), w + (m + r) * width);
    if (s.extended) missed_mass(f, s, *scratch);
  }
}

}  // namespace
