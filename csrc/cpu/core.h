// Stage `core`: A = softmax(s Qt Kt^T), Z by Newton-Schulz from A^T / c, W = Z U (mathematics.md, section 2).
//
// Six iterations are a spectral filter and not an inverse; never replace them by a better inverse. Matrices are (m, ld)
// with ld = padded(m) and zero columns beyond m. The reverse pass is in core_backward.h.
#pragma once

#include "tile.h"

namespace {

// m where some sample can be in the Nyström regime, else 0: a large m that only asks for exactness costs no scratch.
inline int64_t core_size(const Problem& p) {
  return p.queries.length > p.landmarks && p.keys.length > p.landmarks ? p.landmarks : 0;
}

template <class A>
struct CoreScratch {
  A *kt, *a, *x, *t, *y, *column;
  A* z;  // Z_0 .. Z_iterations, or two of them in turn
  CoreScratch() = default;
  CoreScratch(Arena& arena, const Problem& p, bool all_iterates) {
    const int64_t m = core_size(p), ld = padded(m);
    kt = arena.take<A>(p.head_dim * ld);
    A** const matrices[] = {&a, &x, &t, &y};
    for (A** matrix : matrices) *matrix = arena.take<A>(m * ld);
    column = arena.take<A>(ld);
    z = arena.take<A>((all_iterates ? p.iterations + 1 : 2) * m * ld);
  }
};

// t = diagonal I - x.
template <class A>
void minus(const A* x, A diagonal, int64_t m, int64_t ld, A* t) {
  for (int64_t i = 0; i < m * ld; ++i) t[i] = -x[i];
  for (int64_t i = 0; i < m; ++i) t[i * ld + i] += diagonal;
}

template <class A>
void product(int64_t m, int64_t ld, const A* a, const A* b, A* c, A alpha = A(1)) {
  gemm<false>(m, ld, m, a, ld, b, ld, c, ld, alpha);
}

// A of one problem.
template <class A>
void similarity(const Forward& f, const Head& s, const CoreScratch<A>& scratch) {
  const int64_t m = f.landmarks, ld = padded(m), width = f.head_width();
  transpose(slice<A>(f.kt, s.n, f.keys.landmarks, width), m, f.head_dim, width, scratch.kt, ld, A(f.scale));
  gemm<false>(m, ld, f.head_dim, slice<A>(f.qt, s.n, f.queries.landmarks, width), width, scratch.kt, ld, scratch.a, ld);
  softmax_rows(scratch.a, m, m, ld);
}

// c = (largest row sum) (largest column sum) of A, and the column that attains it. Rows of a softmax sum to 1.
template <class A>
A coefficient(const CoreScratch<A>& scratch, int64_t m, int64_t* argmax) {
  const int64_t ld = padded(m);
  fill(scratch.column, ld, A(0));
  for (int64_t i = 0; i < m; ++i) add(scratch.column, scratch.a + i * ld, ld);
  *argmax = 0;
  for (int64_t j = 1; j < m; ++j) {
    if (scratch.column[j] > scratch.column[*argmax]) *argmax = j;
  }
  return scratch.column[*argmax];
}

// One iteration, Z' = Z (13 I - X (15 I - X (7 I - X))) / 4 with X = A Z.
template <class A>
void newton_schulz(const CoreScratch<A>& scratch, int64_t m, const A* z, A* next) {
  const int64_t ld = padded(m);
  product(m, ld, scratch.a, z, scratch.x);
  minus(scratch.x, A(7), m, ld, scratch.t);
  product(m, ld, scratch.x, scratch.t, scratch.y);
  minus(scratch.y, A(15), m, ld, scratch.t);
  product(m, ld, scratch.x, scratch.t, scratch.y);
  minus(scratch.y, A(13), m, ld, scratch.t);
  product(m, ld, z, scratch.t, next, A(0.25));
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
    similarity(f, s, *scratch);
    c[n] = coefficient(*scratch, f.landmarks, &argmax);
  }
}

// Task: problem. c: one coefficient for all problems, or null for each head's own.
template <class T>
void core(const Forward& f, const double* c, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Scratch<CoreScratch<A>> scratch(static_cast<const Problem&>(f), false);
  const int64_t m = f.landmarks, ld = padded(m), width = f.value_width();
  for (int64_t n = begin; n < end; ++n) {
    const Head s(f, n);
    A* w = slice<A>(f.w, n, f.keys.landmarks, width);
    if (s.regime == Regime::exact_keys) {
      const Rows<T> value = key_rows<T>(f.value, s, f.value_dim);
      for (int64_t j = 0; j < s.key_rows; ++j) value.read(value.position(j), w + j * width);
    }
    if (s.regime != Regime::nystrom) continue;
    similarity(f, s, *scratch);
    int64_t argmax;
    const A own = coefficient(*scratch, m, &argmax);
    A *z = scratch->z, *next = scratch->z + m * ld;
    transpose(scratch->a, m, m, ld, z, ld, A(1) / (c ? A(*c) : own));
    for (int64_t i = 0; i < f.iterations; ++i) {
      newton_schulz(*scratch, m, z, next);
      A* previous = z;
      z = next;
      next = previous;
    }
    gemm<false>(m, width, m, z, ld, slice<A>(f.u, n, f.queries.landmarks, width), width, w, width);
  }
}

}  // namespace
