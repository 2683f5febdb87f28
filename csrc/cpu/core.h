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

// Z_k and what its iteration computes on the way to Z_{k+1}: X = A Z_k, T2 = 15 I - X (7 I - X), T3 = 13 I - X T2.
template <class A>
struct Iterate {
  A *z, *x, *t2, *t3;
};

template <class A>
struct CoreScratch {
  A *kt, *a, *t1, *column, *z, *x;
  int64_t size, kept, stride;  // elements of a matrix; Z_k in memory; elements from one X, T2, T3 to the next
  CoreScratch() = default;

  // Keeps every iterate for the reverse pass, or only the last two.
  CoreScratch(Arena& arena, const Problem& p, bool keep_all) {
    const int64_t m = core_size(p), ld = padded(m);
    size = m * ld;
    kept = keep_all ? p.iterations + 1 : 2;
    stride = keep_all ? 3 * size : 0;
    kt = arena.take<A>(p.head_dim * ld);
    a = arena.take<A>(size);
    t1 = arena.take<A>(size);
    column = arena.take<A>(ld);
    z = arena.take<A>(kept * size);
    x = arena.take<A>((keep_all ? kept : 1) * 3 * size);
  }

  Iterate<A> iterate(int64_t k) const {
    A* steps = x + k * stride;
    return {z + k % kept * size, steps, steps + size, steps + 2 * size};
  }
};

// x += diagonal I.
template <class A>
void add_diagonal(A* x, A diagonal, int64_t m, int64_t ld) {
  for (int64_t i = 0; i < m; ++i) x[i * ld + i] += diagonal;
}

template <class A>
void product(int64_t m, int64_t ld, const A* a, const A* b, A* c, A alpha = A(1)) {
  gemm<false>(m, ld, m, a, ld, b, ld, c, ld, alpha);
}

// A of one problem.
template <class A>
void similarity(const Forward& f, const Head& s, const CoreScratch<A>& scratch) {
  const int64_t m = f.landmarks, ld = padded(m), width = f.head_width();
  transpose(slice<A>(f.kt, s.n, f.columns(), width), m, f.head_dim, width, scratch.kt, ld, A(f.scale));
  gemm<false>(m, ld, f.head_dim, slice<A>(f.qt, s.n, f.queries.landmarks, width), width, scratch.kt, ld, scratch.a, ld);
  for (int64_t j = 0; s.pinned > 0 && s.key_end(j) <= s.pinned; ++j) {  // a segment of pinned tokens is no column
    for (int64_t i = 0; i < m; ++i) scratch.a[i * ld + j] = A(-__builtin_inf());
  }
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

// t1 = 7 I - X.
template <class A>
void first_factor(const A* x, int64_t m, int64_t ld, A* t1) {
  for (int64_t i = 0; i < m * ld; ++i) t1[i] = -x[i];
  add_diagonal(t1, A(7), m, ld);
}

// One iteration: Z_{k+1} = Z_k T3 / 4.
template <class A>
void newton_schulz(const CoreScratch<A>& scratch, int64_t m, int64_t k) {
  const int64_t ld = padded(m);
  const Iterate<A> it = scratch.iterate(k);
  product(m, ld, scratch.a, it.z, it.x);
  first_factor(it.x, m, ld, scratch.t1);
  product(m, ld, it.x, scratch.t1, it.t2, A(-1));
  add_diagonal(it.t2, A(15), m, ld);
  product(m, ld, it.x, it.t2, it.t3, A(-1));
  add_diagonal(it.t3, A(13), m, ld);
  product(m, ld, it.z, it.t3, scratch.iterate(k + 1).z, A(0.25));
}

// A, c and Z_0 .. Z_iterations of one problem; returns c. `given`: the global c, or null for the head's own.
template <class A>
A iterate_core(const Forward& f, const Head& s, const double* given, const CoreScratch<A>& scratch, int64_t* argmax) {
  const int64_t m = f.landmarks, ld = padded(m);
  similarity(f, s, scratch);
  const A own = coefficient(scratch, m, argmax), c = given ? A(*given) : own;
  transpose(scratch.a, m, m, ld, scratch.iterate(0).z, ld, A(1) / c);
  for (int64_t k = 0; k < f.iterations; ++k) newton_schulz(scratch, m, k);
  return c;
}

// t1 = s Qt Kt^T + log c_J, the landmarks' share of the logits of mathematics.md, section 6; kt is from `similarity`.
template <class A>
void counted_scores(const Forward& f, const Head& s, const CoreScratch<A>& scratch) {
  const int64_t m = f.landmarks, ld = padded(m), width = f.head_width();
  for (int64_t j = 0; j < ld; ++j) {
    const A count = j < m ? log_count<A>(s.key_end(j) - s.key_begin(j)) : -A(__builtin_inf());
    for (int64_t i = 0; i < m; ++i) scratch.t1[i * ld + j] = count;
  }
  gemm<false>(m, ld, f.head_dim, slice<A>(f.qt, s.n, f.queries.landmarks, width), width, scratch.kt, ld, scratch.t1, ld,
              A(1), true);
}

// missed = LSE3 - logsumexp_J(s Qt Kt^T + log c_J).
template <class A>
void missed_mass(const Forward& f, const Head& s, const CoreScratch<A>& scratch) {
  const int64_t m = f.landmarks, rows = f.queries.landmarks;
  counted_scores(f, s, scratch);
  A* missed = slice<A>(f.missed, s.n, rows);
  softmax_rows<true>(scratch.t1, m, m, padded(m), missed);
  for (int64_t i = 0; i < m; ++i) missed[i] = slice<A>(f.lse, s.n, rows)[i] - missed[i];
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
    A* w = slice<A>(f.w, n, f.columns(), width);
    const Rows<T> value = key_rows<T>(f.value, s, f.value_dim);
    if (s.regime == Regime::exact_keys) {
      for (int64_t j = 0; j < s.key_rows; ++j) value.read(value.position(j), w + j * width);
    }
    if (s.regime != Regime::nystrom) continue;
    int64_t argmax;
    iterate_core(f, s, c, *scratch, &argmax);
    gemm<false>(m, width, m, scratch->iterate(f.iterations).z, ld, slice<A>(f.u, n, f.queries.landmarks, width), width,
                w, width);
    for (int64_t r = 0; r < s.pinned; ++r) value.read(value.position(r), w + (m + r) * width);
    if (s.extended) missed_mass(f, s, *scratch);
  }
}

}  // namespace
