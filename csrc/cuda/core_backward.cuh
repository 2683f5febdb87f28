// Stage `core`, backward: the exact reverse of the iteration, including dc (mathematics.md, section 3). The implicit
// derivative -Z^T dZ Z^T would be wrong: six iterations do not converge. One block per problem.
#pragma once

#include "core.cuh"

namespace nystrom_ext::cuda {

struct CoreBackwardParameters : Backward {
  CoreMemory core;
  void *dw_part, *dkt_part;  // of the query pass
  void* dmissed_rows;        // a number a query: what each query adds to dmissed of its segment; null unless extended
  void* dc;                  // (N): gradients of the coefficient, for the option "global" only
};

// to (rows, width) of a head = the sum of its chunks of queries, in order.
template <class A>
__device__ void merge_chunks(A* to, const void* parts, const Backward& g, const Head& s, int64_t width) {
  const int64_t rows = g.columns(), used = divide_up(s.queries.count, kChunk), next = g.heads * rows * width;
  const A* from = static_cast<const A*>(parts) + first_part(g, s, chunks(g, g.queries)) * rows * width;
  for (int64_t i = threadIdx.x; i < s.columns() * width; i += blockDim.x) {
    A sum = 0;
    for (int64_t c = 0; c < used; ++c) sum += from[c * next + i];
    to[s.n * rows * width + i] = sum;
  }
}

// dmissed_sigma = the sum over the queries of segment sigma, in order.
template <class A>
__device__ void merge_missed(const CoreBackwardParameters& g, const Head& s) {
  const A* from = query_slice<A>(g.dmissed_rows, g, s);
  warp_rows(s.queries.rows, [&](int j, int lane) {
    A sum = 0;
    for (int i = s.queries.begin(j) + lane; i < s.queries.begin(j + 1); i += 32) sum += from[i];
    sum = warp_sum(sum);
    if (lane == 0) slice<A>(g.dmissed, s.n, g.queries.landmarks)[j] = sum;
  });
}

template <class A>
struct CoreReverse : Core<A> {
  using Core<A>::m;
  using Core<A>::matrix;
  using Core<A>::z;
  const Backward& g;
  View<A> dz, dz_next, x, t2, t3, dt, dt2, da, a;  // the first are in shared memory
  static constexpr int kMatrices = 9;

  __device__ CoreReverse(const Backward& backward, const CoreMemory& memory, int64_t problem)
      : Core<A>(backward, memory, problem),
        g(backward),
        dz(matrix(0)),
        dz_next(matrix(1)),
        x(matrix(2)),
        t2(matrix(3)),
        t3(matrix(4)),
        dt(matrix(5)),
        dt2(matrix(6)),
        da(matrix(7)),
        a(matrix(8)) {}

  __device__ View<A> dqt() const { return this->buffer(g.dqt, g.queries.landmarks, g.head_width()); }
  __device__ View<A> dkt() const { return this->buffer(g.dkt, g.columns(), g.head_width()); }
  __device__ View<A> du() const { return this->buffer(g.du, g.queries.landmarks, g.value_width()); }
  __device__ View<A> dw() const { return this->buffer(g.dw, g.columns(), g.value_width()); }

  // dZ_k from dz = dZ_{k+1}; adds to da.
  __device__ void newton_schulz(int k) {
    const View<A> zk = z(k), dx = t3;  // whose last reader is dZ
    this->factors(a, zk, x, t2, t3);
    product(m, m, m, dz, transposed(t3), [&](int i, int j, A s) { dz_next.at(i, j) = s / 4; });  // dZ  = dZ' T3^T / 4
    product(m, m, m, transposed(zk), dz, [&](int i, int j, A s) { dt.at(i, j) = s / 4; });       // dT3 = Z^T dZ' / 4
    __syncthreads();
    product(m, m, m, dt, transposed(t2), [&](int i, int j, A s) { dx.at(i, j) = -s; });  // dX  = -dT3 T2^T
    product(m, m, m, transposed(x), dt, [&](int i, int j, A s) { dt2.at(i, j) = -s; });  // dT2 = -X^T dT3
    __syncthreads();
    // dX -= dT2 T1^T with T1 = 7 I - X; dX -= dT1 = -X^T dT2
    product(m, m, m, dt2, transposed(x), [&](int i, int j, A s) { dx.at(i, j) += s - 7 * dt2.at(i, j); });
    product(m, m, m, transposed(x), dt2, [&](int i, int j, A s) { dx.at(i, j) += s; });
    __syncthreads();
    product(m, m, m, dx, transposed(zk), [&](int i, int j, A s) { da.at(i, j) += s; });      // dA += dX Z^T
    product(m, m, m, transposed(a), dx, [&](int i, int j, A s) { dz_next.at(i, j) += s; });  // dZ += A^T dX
    __syncthreads();
    const View<A> swap = dz;
    dz = dz_next;
    dz_next = swap;
  }

  // Through missed = LSE3 - logsumexp_J(s Qt Kt^T + log c_J), whose second part has the gradient -s dmissed B, B the
  // softmax of those scores; LSE3's share is in delta3.
  __device__ void missed_backward() {
    const A* dmissed = slice<A>(g.dmissed, this->n, g.queries.landmarks);
    __syncthreads();
    this->counted_similarity(da, [](int, A) {});
    elements(m, m, [&](int i, int j) { da.at(i, j) *= -A(g.scale) * dmissed[i]; });
    __syncthreads();
    scores_backward(true);
  }

  // dQt (+)= dS Kt, dKt += dS^T Qt with dS = da, s times the gradient of the scores.
  __device__ void scores_backward(bool add_dqt) {
    const int d = int(g.head_width());
    const View<A> to_q = dqt(), to_k = dkt();
    if (g.wanted.query) {
      product(m, d, m, da, this->kt(), [&](int i, int j, A s) { to_q.at(i, j) = add_dqt ? to_q.at(i, j) + s : s; });
    }
    if (g.wanted.key) product(m, d, m, transposed(da), this->qt(), [&](int i, int j, A s) { to_k.at(i, j) += s; });
  }

  // Through A = softmax(s Qt Kt^T): da becomes s dS2.
  __device__ void similarity_backward(bool add_dqt) {
    const A scale = A(g.scale);
    warp_rows(m, [&](int i, int lane) {
      A delta = 0;
      for (int j = lane; j < m; j += 32) delta += a.at(i, j) * da.at(i, j);
      delta = warp_sum(delta);
      for (int j = lane; j < m; j += 32) da.at(i, j) = scale * a.at(i, j) * (da.at(i, j) - delta);
    });
    __syncthreads();
    scores_backward(add_dqt);
  }

  // <dZ_0, Z_0> in a fixed order.
  __device__ A initial_product(const View<A>& z0) const {
    __syncthreads();
    warp_rows(m, [&](int i, int lane) {
      A sum = 0;
      for (int j = lane; j < m; j += 32) sum += dz.at(i, j) * z0.at(i, j);
      sum = warp_sum(sum);
      if (lane == 0) this->columns[i] = sum;
    });
    __syncthreads();
    A total = 0;
    for (int i = 0; i < m; ++i) total += this->columns[i];
    return total;
  }

  // dU, dQt, dKt in the Nyström regime; returns the gradient of c.
  __device__ A run() {
    int argmax;
    const A c = this->iterate(a, x, t3, argmax, [&](int k) { return z(k); }, [&](int) { return t2; });
    const int e = int(g.value_width());
    const View<A> to_u = du();
    product(m, m, e, dw(), transposed(this->u()), [&](int i, int j, A s) { dz.at(i, j) = s; });  // dZ = dW U^T
    product(m, e, m, transposed(z(int(g.iterations))), dw(), [&](int i, int j, A s) { to_u.at(i, j) = s; });
    elements(m, m, [&](int i, int j) { da.at(i, j) = 0; });
    __syncthreads();
    for (int k = int(g.iterations) - 1; k >= 0; --k) newton_schulz(k);
    const A dc = -initial_product(z(0)) / c;
    elements(m, m, [&](int i, int j) {
      da.at(i, j) += dz.at(j, i) / c + (j == argmax && !g.global_coefficient ? dc : A(0));
    });
    __syncthreads();
    similarity_backward(false);
    if (Head(g, this->n).extended) missed_backward();
    return dc;
  }
};

// dU = Z^T dW: all that dV asks of the core.
template <class A>
__device__ void core_values(const CoreBackwardParameters& g, int64_t n) {
  iterate_core<A>(g, g.core, n);
  __syncthreads();
  const Core<A> core(g, g.core, n);
  const int e = int(g.value_width());
  const View<A> dw = core.buffer(g.dw, g.columns(), e), du = core.buffer(g.du, g.queries.landmarks, e);
  product(core.m, e, core.m, transposed(core.z(0)), dw, [&](int i, int j, A s) { du.at(i, j) = s; });
}

// dU = dO: every query is its own landmark.
template <class T>
__device__ void copy_gradient(const Backward& g, const Head& s) {
  using A = AccOf<T>;
  const int e = int(g.value_width()), d = int(g.head_width());
  const Rows<const T> dout = query_rows<const T>(g.out, s, g.value_dim);
  A* du = slice<A>(g.du, s.n, g.queries.landmarks, e);
  A* dqt = slice<A>(g.dqt, s.n, g.queries.landmarks, d);
  elements(s.queries.rows, e,
           [&](int i, int j) { du[i * e + j] = j < dout.columns ? to_acc(dout.row(i)[j * dout.feature]) : A(0); });
  if (g.wanted.query) elements(s.queries.rows, d, [&](int i, int j) { dqt[i * d + j] = 0; });
}

template <class T>
__global__ void core_backward(const __grid_constant__ CoreBackwardParameters g) {
  using A = AccOf<T>;
  const Head s(g, blockIdx.x);
  if (s.has_query_pass()) {
    if (needs_dw(g, s)) merge_chunks(static_cast<A*>(g.dw), g.dw_part, g, s, g.value_width());
    if (g.wanted.key) merge_chunks(static_cast<A*>(g.dkt), g.dkt_part, g, s, g.head_width());
    if (s.extended && g.wanted.scores()) merge_missed<A>(g, s);
    __syncthreads();
  }
  A dc = 0;
  if (s.regime == Regime::nystrom && g.wanted.scores()) dc = CoreReverse<A>(g, g.core, s.n).run();
  if (s.regime == Regime::nystrom && !g.wanted.scores()) core_values<A>(g, s.n);
  if (s.regime == Regime::exact_queries) copy_gradient<T>(g, s);
  if (g.dc && threadIdx.x == 0) static_cast<A*>(g.dc)[s.n] = dc;
  if (!s.has_key_pass() || !g.wanted.scores()) return;

  __syncthreads();
  const int e = int(g.value_width());
  const A *du = slice<A>(g.du, s.n, g.queries.landmarks, e), *u = slice<A>(g.u, s.n, g.queries.landmarks, e);
  warp_rows(s.queries.rows, [&](int i, int lane) {  // delta3 = rowsum(dU * U)
    A sum = 0;
    for (int j = lane; j < e; j += 32) sum += du[i * e + j] * u[i * e + j];
    sum = warp_sum(sum);
    if (s.extended) sum -= slice<A>(g.dmissed, s.n, g.queries.landmarks)[i];  // LSE3's share of missed
    if (lane == 0) slice<A>(g.delta, s.n, g.queries.landmarks)[i] = sum;
  });
}

// Option "global": the coefficient's gradient goes to the one problem and column that attains the maximum. One block.
template <class A>
__global__ void coefficient_backward(const __grid_constant__ CoreBackwardParameters g) {
  int64_t problem;
  if (Core<A>(g, g.core, 0).global_coefficient(problem) <= 0) return;
  A dc = 0;
  for (int64_t i = 0; i < g.problems(); ++i) dc += static_cast<const A*>(g.dc)[i];
  CoreReverse<A> core(g, g.core, problem);
  core.similarity(core.a);
  int argmax;
  core.coefficient(core.a, argmax);
  elements(core.m, core.m, [&](int i, int j) { core.da.at(i, j) = j == argmax ? dc : A(0); });
  __syncthreads();
  core.similarity_backward(true);
}

}  // namespace nystrom_ext::cuda
