// Stage `core`, backward: the exact reverse of the iteration, including dc (mathematics.md, section 3). The implicit
// derivative -Z^T dZ Z^T would be wrong: six iterations do not converge.
#pragma once

#include "core.h"

namespace {

template <class A>
struct CoreBackwardScratch {
  CoreScratch<A> forward;
  A *da, *dz, *dz_next, *dx, *dt, *dt_next, *transposed, *ut;
  CoreBackwardScratch() = default;
  CoreBackwardScratch(Arena& arena, const Backward& g) : forward(arena, g, g.wanted.scores()) {
    const int64_t m = g.wanted.scores() ? core_size(g) : 0, ld = padded(m);
    A** const matrices[] = {&da, &dz, &dz_next, &dx, &dt, &dt_next, &transposed};
    for (A** matrix : matrices) *matrix = arena.take<A>(m * ld);
    ut = arena.take<A>(g.value_dim * ld);
  }
};

// c = alpha a b^T, or plus c.
template <class A>
void product_bt(const CoreBackwardScratch<A>& s, int64_t m, const A* a, const A* b, A* c, A alpha, bool plus) {
  const int64_t ld = padded(m);
  transpose(b, m, m, ld, s.transposed, ld);
  gemm<false>(m, ld, m, a, ld, s.transposed, ld, c, ld, alpha, plus);
}

// c = alpha a^T b, or plus c.
template <class A>
void product_at(int64_t m, const A* a, const A* b, A* c, A alpha, bool plus) {
  const int64_t ld = padded(m);
  gemm<true>(m, ld, m, a, ld, b, ld, c, ld, alpha, plus);
}

// dZ_k from s.dz = dZ_{k+1}, left in s.dz_next; adds to s.da.
template <class A>
void newton_schulz_backward(const CoreBackwardScratch<A>& s, int64_t m, int64_t k) {
  const A *a = s.forward.a, *t1 = s.forward.t1;
  const Iterate<A> it = s.forward.iterate(k);
  first_factor(it.x, m, padded(m), s.forward.t1);

  product_bt(s, m, s.dz, it.t3, s.dz_next, A(0.25), false);  // dZ  = dZ' T3^T / 4
  product_at(m, it.z, s.dz, s.dt, A(0.25), false);           // dT3 = Z^T dZ' / 4
  product_bt(s, m, s.dt, it.t2, s.dx, A(-1), false);         // dX  = -dT3 T2^T
  product_at(m, it.x, s.dt, s.dt_next, A(-1), false);        // dT2 = -X^T dT3
  product_bt(s, m, s.dt_next, t1, s.dx, A(-1), true);        // dX -= dT2 T1^T
  product_at(m, it.x, s.dt_next, s.dx, A(1), true);          // dX -= dT1 = -X^T dT2
  product_bt(s, m, s.dx, it.z, s.da, A(1), true);            // dA += dX Z^T
  product_at(m, a, s.dx, s.dz_next, A(1), true);             // dZ += A^T dX
}

// s.da holds s dS2: dQt (+)= s dS2 Kt, dKt += s dS2^T Qt.
template <class A>
void scores_backward(const Backward& g, const Head& h, const CoreBackwardScratch<A>& s, bool add_dqt) {
  const int64_t m = g.landmarks, ld = padded(m), d = g.head_width();
  const A *qt = slice<A>(g.qt, h.n, g.queries.landmarks, d), *kt = slice<A>(g.kt, h.n, g.columns(), d);
  if (g.wanted.query) {
    gemm<false>(m, d, m, s.da, ld, kt, d, slice<A>(g.dqt, h.n, g.queries.landmarks, d), d, A(1), add_dqt);
  }
  if (g.wanted.key) gemm<true>(m, d, m, s.da, ld, qt, d, slice<A>(g.dkt, h.n, g.columns(), d), d, A(1), true);
}

// Through missed = LSE3 - logsumexp_J(s Qt Kt^T + log c_J), whose second part has the gradient -s dmissed B with B the
// softmax of those scores; LSE3's share is in delta3.
template <class A>
void missed_backward(const Backward& g, const Head& h, const CoreBackwardScratch<A>& s) {
  const int64_t m = g.landmarks, ld = padded(m);
  counted_scores(g, h, s.forward);
  softmax_rows(s.forward.t1, m, m, ld);
  const A* dmissed = slice<A>(g.dmissed, h.n, g.queries.landmarks);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < ld; ++j) s.da[i * ld + j] = -A(g.scale) * dmissed[i] * s.forward.t1[i * ld + j];
  }
  scores_backward(g, h, s, true);
}

// Through A = softmax(s Qt Kt^T): s.da becomes s dS2.
template <class A>
void similarity_backward(const Backward& g, const Head& h, const CoreBackwardScratch<A>& s, bool add_dqt) {
  softmax_rows_backward(s.forward.a, s.da, g.landmarks, padded(g.landmarks), A(g.scale));
  scores_backward(g, h, s, add_dqt);
}

// dU and, where they are wanted, dQt, dKt of one problem in the Nyström regime; returns the gradient of c.
template <class A>
A core_reverse(const Backward& g, const Head& h, const double* c, const CoreBackwardScratch<A>& s) {
  const int64_t m = g.landmarks, ld = padded(m), e = g.value_width(), size = m * ld;
  int64_t argmax;
  const A used = iterate_core(g, h, c, s.forward, &argmax);

  const A* dw = slice<A>(g.dw, h.n, g.columns(), e);
  A* u = slice<A>(g.u, h.n, g.queries.landmarks, e);
  gemm<true>(m, e, m, s.forward.iterate(g.iterations).z, ld, dw, e, slice<A>(g.du, h.n, g.queries.landmarks, e),
             e);  // dU = Z^T dW
  if (!g.wanted.scores()) return A(0);
  transpose(u, m, g.value_dim, e, s.ut, ld);
  gemm<false>(m, ld, g.value_dim, dw, e, s.ut, ld, s.dz, ld);  // dZ = dW U^T

  fill(s.da, size, A(0));
  CoreBackwardScratch<A> step = s;
  for (int64_t i = g.iterations - 1; i >= 0; --i) {
    newton_schulz_backward(step, m, i);
    A* next = step.dz_next;
    step.dz_next = step.dz;
    step.dz = next;
  }
  const A* z = s.forward.iterate(0).z;  // A^T / c
  A dc = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) s.da[i * ld + j] += step.dz[j * ld + i] / used;
    dc -= dot(step.dz + i * ld, z + i * ld, ld) / used;
  }
  if (c == nullptr) {
    for (int64_t i = 0; i < m; ++i) s.da[i * ld + argmax] += dc;
  }
  similarity_backward(g, h, s, false);
  if (h.extended) missed_backward(g, h, s);
  return dc;
}

// Task: problem. On entry dW and dKt hold the query pass's sums. dc[n]: gradient of the global c.
template <class T>
void core_backward(const Backward& g, const double* c, double* dc, int64_t begin, int64_t end) {
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
      const A own = core_reverse(g, s, c, *scratch);
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
  const Head s(g, problem);
  const int64_t m = g.landmarks, ld = padded(m);
  similarity(g, s, scratch->forward);
  int64_t argmax;
  coefficient(scratch->forward, m, &argmax);
  fill(scratch->da, m * ld, A(0));
  for (int64_t i = 0; i < m; ++i) scratch->da[i * ld + argmax] = A(dc);
  similarity_backward(g, s, *scratch, true);
}

}  // namespace
