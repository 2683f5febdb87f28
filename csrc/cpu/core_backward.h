// Stage `core`, backward: the exact reverse of the iteration, including dc (mathematics.md, section 3). The implicit
// derivative -Z^T dZ Z^T would be wrong: six iterations do not converge.
//
// W = A^T (T3_0 / 4) ... (T3_5 / 4) U / c with X_{k+1} = X_k T3_k / 4, X_0 = A A^T / c. All X and T3 are symmetric and
// commute, so the gradients D of T3 and F of X may be taken symmetric, and Z appears only in V_k = Z_k^T dW.
#pragma once

#include "core.h"

namespace {

template <class A>
struct CoreBackwardScratch {
  CoreScratch<A> forward;
  A *d, *r, *f, *f_next;       // D, R, F_{k+1} and F_k
  A *dwt, *vt, *ut, *ut_next;  // (e, ld): dW^T; V_k^T; U_{k+1}^T and U_k^T
  int64_t stride;              // elements from one V_k^T to the next
  CoreBackwardScratch() = default;
  CoreBackwardScratch(Arena& arena, const Backward& g) : forward(arena, g, g.wanted.scores()) {
    const Grid& grid = forward.grid;
    const int64_t size = g.wanted.scores() ? grid.size() : 0, tall = g.value_dim * grid.ld;
    A** const matrices[] = {&d, &r, &f, &f_next};
    for (A** matrix : matrices) *matrix = arena.take<A>(size);
    dwt = arena.take<A>(tall);
    ut = arena.take<A>(tall);
    ut_next = arena.take<A>(tall);
    stride = size ? tall : 0;
    vt = arena.take<A>(stride ? g.iterations * stride : tall);
  }
};

// c = alpha x z for x of e rows.
template <class A>
void tall_product(const Team& team, const Grid& g, int64_t e, const A* x, const A* z, A* c, A alpha) {
  for_columns(team, g, [&](int64_t j, int64_t columns) {
    gemm<false>(e, columns, g.m, x, g.ld, z + j, g.ld, c + j, g.ld, alpha);
  });
}

// X_k, T3_k, V_k^T of all iterations, the last of each where no scores are wanted, and dU = Z^T dW.
template <class A>
void iterate_core(const Backward& g, const Head& h, const CoreBackwardScratch<A>& s, const Team& team) {
  const Grid& grid = s.forward.grid;
  const int64_t e = g.value_width(), last = g.iterations - 1;
  transpose(slice<A>(g.dw, h.n, g.columns(), e), grid.m, g.value_dim, e, s.dwt, grid.ld);
  for (int64_t k = 0; k <= last; ++k) {
    const Iterate<A> it = s.forward.iterate(k);
    image(s.forward, team, it);
    third_factor(s.forward, team, it);
    if (g.wanted.scores() || k == last) {
      tall_product(team, grid, g.value_dim, s.dwt, it.z, s.vt + k * s.stride, A(1));
    }
    if (k < last) next_iterate(s.forward, team, it, s.forward.iterate(k + 1).z);
  }
  if (last < 0) {
    tall_product(team, grid, g.value_dim, s.dwt, s.forward.z, s.ut, A(1));
  } else {
    tall_product(team, grid, g.value_dim, s.vt + last * s.stride, s.forward.iterate(last).t3, s.ut, A(0.25));
  }
  transpose(s.ut, g.value_dim, grid.m, grid.ld, slice<A>(g.du, h.n, g.queries.landmarks, e), e);
}

// D = dL/dT3_k: the symmetric part of (V_k U_{k+1}^T + X_k F_{k+1}) / 4. `f` null: zero.
template <class A>
void third_factor_backward(const CoreBackwardScratch<A>& s, const Team& team, int64_t e, const Iterate<A>& it,
                           const A* vt, const A* f) {
  const Grid g = s.forward.grid;
  for_lower(team, g, [&](const Block& b) {
    const A half = b.diagonal() ? A(0.25) : A(0.125);
    block_product_at(g, b, e, vt, s.ut, s.d, half, false);
    if (f) block_product(g, b, it.x, f, s.d, half, true);
    if (b.diagonal()) return symmetrize(g, b, s.d);
    block_product_at(g, b, e, s.ut, vt, s.d, half, true);
    if (f) block_product(g, b, f, it.x, s.d, half, true);
    mirror(g, b, s.d);
  });
}

// The block of R = 7 D - Y - Y^T / 2 and the one across the diagonal, from Y = X D in R's place.
template <class A>
void residual(const Grid& g, const Block& b, const A* d, A* r) {
  const Block across(g, b.j / kSide, b.i / kSide);
  const Transposed<A> here(g, b.i, b.j, b.rows, across.rows, r), there(g, b.j, b.i, across.rows, b.rows, r);
  const auto set = [&](const Block& at, const A* yt) {
    for (int64_t i = 0; i < at.rows; ++i) {
      const int64_t begin = (at.i + i) * g.ld + at.j;
      for (int64_t x = 0; x < at.columns; ++x) {
        r[begin + x] = 7 * d[begin + x] - r[begin + x] - A(0.5) * yt[i * kSide + x];
      }
    }
  };
  set(b, there.data);
  if (!b.diagonal()) set(across, here.data);
}

// F_k = dL/dX_k = sym(F_{k+1} T3) / 4 + dT3/dX, which is -15 D + 7 (X D + D X) - (X X D + X D X + D X X)
// = -15 D + X R + R^T X with R = 7 D - X D - D X / 2. Leaves it in s.f_next, from D in s.d.
template <class A>
void image_backward(const CoreBackwardScratch<A>& s, const Team& team, const Iterate<A>& it, const A* f) {
  const Grid g = s.forward.grid;
  for_lower(team, g, [&](const Block& b) {
    block_product(g, b, it.x, s.d, s.r);
    if (!b.diagonal()) block_product(g, Block(g, b.j / kSide, b.i / kSide), it.x, s.d, s.r);
    residual(g, b, s.d, s.r);
  });
  for_lower(team, g, [&](const Block& b) {
    A* to = s.f_next;
    block_product(g, b, it.x, s.r, to, b.diagonal() ? A(2) : A(1));
    if (f) block_product(g, b, f, it.t3, to, b.diagonal() ? A(0.25) : A(0.125), true);
    if (b.diagonal()) {
      symmetrize(g, b, to);
    } else {
      block_product_at(g, b, g.m, s.r, it.x, to, A(1), true);
      if (f) block_product(g, b, it.t3, f, to, A(0.125), true);
    }
    add_block(g, b, A(-15), s.d, to);
    mirror(g, b, to);
  });
}

// s.r holds s dS2: dQt (+)= s dS2 Kt, dKt += s dS2^T Qt.
template <class A>
void scores_backward(const Backward& g, const Head& h, const CoreBackwardScratch<A>& s, const Team& team,
                     bool add_dqt) {
  const Grid grid = s.forward.grid;
  const int64_t m = grid.m, ld = grid.ld, d = g.head_width();
  const A *qt = slice<A>(g.qt, h.n, g.queries.landmarks, d), *kt = slice<A>(g.kt, h.n, g.columns(), d);
  A *dqt = slice<A>(g.dqt, h.n, g.queries.landmarks, d), *dkt = slice<A>(g.dkt, h.n, g.columns(), d);
  for_rows(team, grid, [&](int64_t i, int64_t rows) {
    if (g.wanted.query) gemm<false>(rows, d, m, s.r + i * ld, ld, kt, d, dqt + i * d, d, A(1), add_dqt);
    if (g.wanted.key) gemm<true>(rows, d, m, s.r + i, ld, qt, d, dkt + i * d, d, A(1), true);
  });
}

// Through missed = LSE3 - logsumexp_J(s Qt Kt^T + log c_J), whose second part has the gradient -s dmissed B with B the
// softmax of those scores; LSE3's share is in delta3.
template <class A>
void missed_backward(const Backward& g, const Head& h, const CoreBackwardScratch<A>& s, const Team& team) {
  const Grid grid = s.forward.grid;
  counted_scores(g, h, s.forward);
  softmax_rows(s.forward.t2, grid.m, grid.m, grid.width, grid.ld);
  const A* dmissed = slice<A>(g.dmissed, h.n, g.queries.landmarks);
  for (int64_t i = 0; i < grid.m; ++i) {
    for (int64_t j = i * grid.ld; j < i * grid.ld + grid.width; ++j) {
      s.r[j] = -A(g.scale) * dmissed[i] * s.forward.t2[j];
    }
  }
  scores_backward(g, h, s, team, true);
}

// Through A = softmax(s Qt Kt^T): s.r, which holds dA, becomes s dS2.
template <class A>
void similarity_backward(const Backward& g, const Head& h, const CoreBackwardScratch<A>& s, const Team& team,
                         bool add_dqt) {
  const Grid grid = s.forward.grid;
  for_rows(team, grid, [&](int64_t i, int64_t rows) {
    softmax_rows_backward(s.forward.a + i * grid.ld, s.r + i * grid.ld, rows, grid.width, grid.ld, A(g.scale));
  });
  scores_backward(g, h, s, team, add_dqt);
}

// dA = (U_0 dW^T + 2 F_0 A) / c in s.r; returns dc = -(<dW, W> + <F_0, X_0>) / c.
template <class A>
A start_backward(const Backward& g, const Head& h, A c, const CoreBackwardScratch<A>& s, const Team& team, const A* f) {
  const Grid grid = s.forward.grid;
  const int64_t e = g.value_width();
  for_blocks(team, grid, [&](const Block& b) {
    block_product_at(grid, b, g.value_dim, s.ut, s.dwt, s.r, A(1) / c, false);
    if (f) block_product(grid, b, f, s.forward.a, s.r, A(2) / c, true);
  });
  A dc = -dot(slice<A>(g.dw, h.n, g.columns(), e), slice<A>(g.w, h.n, g.columns(), e), grid.m * e);
  for (int64_t i = 0; f && i < grid.m; ++i) dc -= dot(f + i * grid.ld, s.forward.x + i * grid.ld, grid.width);
  return dc / c;
}

// dU and, where they are wanted, dQt, dKt of one problem in the Nyström regime; returns the gradient of c.
template <class A>
A core_reverse(const Backward& g, const Head& h, const double* given, const CoreBackwardScratch<A>& scratch,
               const Team& team) {
  const Grid grid = scratch.forward.grid;
  const int64_t e = g.value_dim, width = g.value_width();
  int64_t argmax;
  const A c = start_core(g, h, given, scratch.forward, team, &argmax);
  iterate_core(g, h, scratch, team);
  if (!g.wanted.scores()) return A(0);

  CoreBackwardScratch<A> s = scratch;
  const A* f = nullptr;
  transpose(slice<A>(g.u, h.n, g.queries.landmarks, width), grid.m, e, width, s.ut, grid.ld);
  for (int64_t k = g.iterations - 1; k >= 0; --k) {
    const Iterate<A> it = s.forward.iterate(k);
    third_factor_backward(s, team, e, it, s.vt + k * s.stride, f);
    image_backward(s, team, it, f);
    tall_product(team, grid, e, s.ut, it.t3, s.ut_next, A(0.25));
    swap(s.f, s.f_next);
    swap(s.ut, s.ut_next);
    f = s.f;
  }
  const A dc = start_backward(g, h, c, s, team, f);
  for (int64_t i = 0; given == nullptr && i < grid.m; ++i) s.r[i * grid.ld + argmax] += dc;
  similarity_backward(g, h, s, team, false);
  if (h.extended) missed_backward(g, h, s, team);
  return dc;
}

// Task: problem. On entry dW and dKt hold the query pass's sums. dc[n]: gradient of the global c. The team shares each
// task's steps.
template <class T>
void core_backward(const Backward& g, const double* c, double* dc, const Team& team, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<CoreBackwardScratch<A>> scratch(g);
  const int64_t rows = g.queries.landmarks, e = g.value_width(), d = g.head_width();
  for (int64_t n = begin; n < end; ++n) {
    const Head s(g, n);
    A *u = slice<A>(g.u, n, rows, e), *du = slice<A>(g.du, n, rows, e);
    if (dc) dc[n] = 0;
    if (s.regime == Regime::exact_queries) {
      const Rows<T> dout = query_rows<T>(g.out, s, g.value_dim);
      for (int64_t j = 0; j < s.query_rows; ++j) dout.read(dout.position(j), du + j * e);
      if (g.wanted.query) fill(slice<A>(g.dqt, n, rows, d), s.query_rows * d, A(0));
    } else if (s.regime == Regime::nystrom) {
      const A own = core_reverse(g, s, c, *scratch, team);
      if (dc) dc[n] = own;
    } else {
      continue;
    }
    if (!g.wanted.scores()) continue;
    for (int64_t j = 0; j < s.query_rows; ++j) slice<A>(g.delta, n, rows)[j] = dot(du + j * e, u + j * e, e);
    for (int64_t j = 0; s.extended && j < s.query_rows; ++j) {
      slice<A>(g.delta, n, rows)[j] -= slice<A>(g.dmissed, n, rows)[j];
    }
  }
}

// The global coefficient's gradient goes to the one problem and column that attains the maximum.
template <class T>
void coefficient_backward(const Backward& g, int64_t problem, double dc) {
  using A = Acc<T>;
  const Scratch<CoreBackwardScratch<A>> scratch(g);
  const Grid grid = scratch->forward.grid;
  const Head s(g, problem);
  similarity(g, s, scratch->forward, Team{});
  int64_t argmax;
  coefficient(scratch->forward, &argmax);
  fill(scratch->r, grid.size(), A(0));
  for (int64_t i = 0; i < grid.m; ++i) scratch->r[i * grid.ld + argmax] = A(dc);
  similarity_backward(g, s, *scratch, Team{}, true);
}

}  // namespace
