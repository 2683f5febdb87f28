// Stage `core`: A = softmax(s Qt Kt^T), Z by Newton-Schulz from A^T / c, W = Z U (mathematics.md, section 2). One block
// per problem, in the accumulation type.
//
// Six iterations are a spectral filter and not an inverse; never replace them by a better inverse. A and Z need the
// landmarks only and share a launch with the key pass; `finish_core` merges that pass's chunks and multiplies.
#pragma once

#include "key_pass.cuh"
#include "matrix.cuh"

namespace nystrom_ext::cuda {

// Where the m x m matrices are.
struct CoreMemory {
  void* z;             // (N, kept, matrix_size): Z_iterations, or for the reverse pass every Z_k
  void* matrices;      // (N, matrices without room in shared memory, matrix_size)
  void* coefficients;  // (N): column sums' maxima, for the option "global" only; else null
  int kept, fit, count;
};

// m where some sample can be in the Nyström regime, else 0: a large m that only asks for exactness costs no memory.
inline __host__ __device__ int64_t core_size(const Problem& p) {
  return p.queries.length > p.landmarks && p.keys.length > p.landmarks ? p.landmarks : 0;
}
inline __host__ __device__ int64_t matrix_pitch(const Problem& p) { return core_size(p) + 4; }
inline __host__ __device__ int64_t matrix_size(const Problem& p) { return core_size(p) * matrix_pitch(p); }

template <class A>
struct Core {
  const Forward& f;
  const CoreMemory& memory;
  const int64_t n;
  const int m;
  A* columns;  // (m) in shared memory, before the matrices

  __device__ Core(const Forward& forward, const CoreMemory& where, int64_t problem)
      : f(forward),
        memory(where),
        n(problem),
        m(int(forward.landmarks)),
        columns(reinterpret_cast<A*>(dynamic_shared_memory())) {}

  static __host__ __device__ int64_t shared_bytes(const Problem& p, int fit) {
    return (round_up(core_size(p), 4) + fit * matrix_size(p)) * int64_t(sizeof(A));
  }

  __device__ View<A> view(A* data) const { return {data, matrix_pitch(f), 1}; }
  __device__ View<A> matrix(int i) const {
    const int64_t size = matrix_size(f);
    if (i < memory.fit) return view(columns + round_up(m, 4) + i * size);
    const int64_t outside = memory.count - memory.fit;
    return view(static_cast<A*>(memory.matrices) + (n * outside + i - memory.fit) * size);
  }
  __device__ View<A> z(int k) const { return view(static_cast<A*>(memory.z) + (n * memory.kept + k) * matrix_size(f)); }
  __device__ View<A> buffer(void* data, int64_t rows, int64_t width) const {
    return {slice<A>(data, n, rows, width), width, 1};
  }
  __device__ View<A> qt() const { return buffer(f.qt, f.queries.landmarks, f.head_width()); }
  __device__ View<A> kt() const { return buffer(f.kt, f.columns(), f.head_width()); }
  __device__ View<A> u() const { return buffer(f.u, f.queries.landmarks, f.value_width()); }
  __device__ View<A> w() const { return buffer(f.w, f.columns(), f.value_width()); }

  // a = softmax(s Qt Kt^T + b_J) over the landmarks J; done(i, LSE of row i) for each row, by one lane.
  template <class Bias, class Done>
  __device__ void softmax(const View<A>& a, Bias bias, Done done) const {
    const A scale = A(f.scale);
    product(m, m, int(f.head_dim), qt(), transposed(kt()),
            [&](int i, int j, A x) { a.at(i, j) = scale * x + bias(j); });
    __syncthreads();
    warp_rows(m, [&](int i, int lane) {
      A top = A(-__builtin_huge_valf()), sum = 0;
      for (int j = lane; j < m; j += 32) top = max(top, a.at(i, j));
      top = warp_max(top);
      for (int j = lane; j < m; j += 32) sum += a.at(i, j) = exp(a.at(i, j) - top);
      sum = warp_sum(sum);
      for (int j = lane; j < m; j += 32) a.at(i, j) /= sum;
      if (lane == 0) done(i, top + log(sum));
    });
    __syncthreads();
  }

  // A = softmax(s Qt Kt^T), without the segments that pinned tokens leave empty.
  __device__ void similarity(const View<A>& a) const {
    const Head s(f, n);
    const auto live = [&](int j) {
      return s.extended && s.key_begin(j) == s.key_end(j) ? A(-__builtin_huge_valf()) : A(0);
    };
    softmax(a, live, [](int, A) {});
  }

  // b = softmax(s Qt Kt^T + log c_J): what the landmarks alone make of a landmark query (section 6).
  template <class Done>
  __device__ void counted_similarity(const View<A>& b, Done done) const {
    const Head s(f, n);
    softmax(b, [&](int j) { return log(A(s.key_end(j) - s.key_begin(j))); }, done);
  }

  // c = (largest row sum) (largest column sum) of A, and the column that attains it. Rows of a softmax sum to 1.
  __device__ A coefficient(const View<A>& a, int& argmax) const {
    for (int j = threadIdx.x; j < m; j += blockDim.x) {
      A sum = 0;
      for (int i = 0; i < m; ++i) sum += a.at(i, j);
      columns[j] = sum;
    }
    __syncthreads();
    argmax = 0;
    for (int j = 1; j < m; ++j) argmax = columns[j] > columns[argmax] ? j : argmax;
    return columns[argmax];
  }

  // Option "global": the largest coefficient of the batch, and the problem that attains it. NaN counts as the largest.
  __device__ A global_coefficient(int64_t& problem) const {
    const A* c = static_cast<const A*>(memory.coefficients);
    problem = 0;
    for (int64_t i = 1; i < f.problems(); ++i) problem = c[problem] < c[i] || c[i] != c[i] ? i : problem;
    return c[problem];
  }

  // X = A Z, T2 = 15 I - X (7 I - X), T3 = 13 I - X T2.
  __device__ void factors(const View<A>& a, const View<A>& z, const View<A>& x, const View<A>& t2,
                          const View<A>& t3) const {
    product(m, m, m, a, z, [&](int i, int j, A s) { x.at(i, j) = s; });
    __syncthreads();
    product(m, m, m, x, x, [&](int i, int j, A s) { t2.at(i, j) = (i == j ? A(15) : A(0)) - 7 * x.at(i, j) + s; });
    __syncthreads();
    product(m, m, m, x, t2, [&](int i, int j, A s) { t3.at(i, j) = (i == j ? A(13) : A(0)) - s; });
    __syncthreads();
  }

  // A, then Z_0 .. Z_iterations, Z_k at z(k); T2 of iteration k at t2(k). Returns c.
  template <class Z, class T2>
  __device__ A iterate(const View<A>& a, const View<A>& x, const View<A>& t3, int& argmax, Z z, T2 t2) const {
    similarity(a);
    A c = coefficient(a, argmax);
    int64_t problem;
    if (f.global_coefficient) c = global_coefficient(problem);
    const View<A> first = z(0);
    elements(m, m, [&](int i, int j) { first.at(i, j) = a.at(j, i) / c; });
    __syncthreads();
    for (int k = 0; k < f.iterations; ++k) {
      const View<A> next = z(k + 1);
      factors(a, z(k), x, t2(k), t3);
      product(m, m, m, z(k), t3, [&](int i, int j, A s) { next.at(i, j) = s / 4; });
      __syncthreads();
    }
    return c;
  }
};

// Z of one problem.
template <class A>
__device__ void iterate_core(const Forward& f, const CoreMemory& memory, int64_t n) {
  if (Head(f, n).regime != Regime::nystrom) return;
  const Core<A> core(f, memory, n);
  // Z takes the place of T2, which its product does not read; A is read once an iteration and gets shared memory last.
  const View<A> even = core.matrix(0), odd = core.matrix(1);
  const auto z = [&](int k) { return k % 2 ? odd : even; };
  const View<A> x = core.matrix(2), t3 = core.matrix(3), a = core.matrix(4);
  int argmax;
  core.iterate(a, x, t3, argmax, z, [&](int k) { return z(k + 1); });
  const View<A> last = z(int(f.iterations % 2)), out = core.z(0);
  elements(core.m, core.m, [&](int i, int j) { out.at(i, j) = last.at(i, j); });
}

struct KeyPassParameters : Forward {
  CoreMemory core;
  void *u_part, *max_part, *sum_part;
};

template <class A>
__device__ KeyPartials<A> key_partials(const KeyPassParameters& f) {
  return {static_cast<A*>(f.u_part), static_cast<A*>(f.max_part), static_cast<A*>(f.sum_part)};
}

// Blocks 0 .. N - 1: the core; the others: the key pass.
template <class E>
__global__ void __launch_bounds__(E::kThreads, E::kBlocks)
    key_pass_and_core(const __grid_constant__ KeyPassParameters f) {
  using A = typename E::Acc;
  if (blockIdx.x >= f.problems()) {
    KeyPass<E>::run(f, key_partials<A>(f), blockIdx.x - f.problems(), int(blockIdx.y) * E::kOut);
  } else if (blockIdx.y == 0) {
    iterate_core<A>(f, f.core, blockIdx.x);
  }
}

// Option "global": c of every head; 0 outside the Nyström regime.
template <class A>
__global__ void coefficients(const __grid_constant__ KeyPassParameters f) {
  A* c = static_cast<A*>(f.core.coefficients) + blockIdx.x;
  if (Head(f, blockIdx.x).regime != Regime::nystrom) {
    if (threadIdx.x == 0) *c = 0;
    return;
  }
  const Core<A> core(f, f.core, blockIdx.x);
  int argmax;
  core.similarity(core.matrix(0));
  const A own = core.coefficient(core.matrix(0), argmax);
  if (threadIdx.x == 0) *c = own;
}

// U and LSE3 from the chunks of the key pass, in order.
template <class A>
__device__ void merge_keys(const Forward& f, const Head& s, const KeyPartials<A>& partials) {
  const int64_t rows = f.queries.landmarks, width = f.value_width(), next = f.heads * rows;
  const int64_t begin = s.pinned / kChunk, used = divide_up(s.keys.count, kChunk);
  warp_rows(s.queries.rows, [&](int i, int lane) {
    const int64_t base = first_part(f, s, chunks(f, f.keys)) * rows + i;
    A top = partials.max[base + begin * next], sum = 0;
    for (int64_t c = begin + 1; c < used; ++c) {
      const A x = partials.max[base + c * next];
      top = x > top ? x : top;
    }
    for (int64_t c = begin; c < used; ++c)
      sum += partials.sum[base + c * next] * exp2(partials.max[base + c * next] - top);
    for (int64_t j = lane; j < width; j += 32) {
      A u = 0;
      for (int64_t c = begin; c < used; ++c) {
        u += partials.u[(base + c * next) * width + j] * exp2(partials.max[base + c * next] - top);
      }
      slice<A>(f.u, s.n, rows, width)[i * width + j] = u / sum;
    }
    if (lane == 0) slice<A>(f.lse, s.n, rows)[i] = (top + log2(sum)) * A(kLn2);
  });
}

// U, LSE3 and W of one problem.
template <class T>
__global__ void finish_core(const __grid_constant__ KeyPassParameters f) {
  using A = AccOf<T>;
  const Head s(f, blockIdx.x);
  const Core<A> core(f, f.core, s.n);
  const int width = int(f.value_width());
  if (s.has_key_pass()) merge_keys<A>(f, s, key_partials<A>(f));
  if (s.regime == Regime::nystrom) {
    __syncthreads();
    product(core.m, width, core.m, core.z(0), core.u(), [&](int i, int j, A x) { core.w().at(i, j) = x; });
  }
  if (s.extended) {  // missed = LSE3 - logsumexp_J(s Qt Kt^T + log c_J)
    const A* lse = slice<A>(f.lse, s.n, f.queries.landmarks);
    A* missed = slice<A>(f.missed, s.n, f.queries.landmarks);
    core.counted_similarity(core.matrix(0), [&](int i, A own) { missed[i] = lse[i] - own; });
  }
  // Values of keys that are landmarks themselves: all of them, or the pinned ones, whose rows follow.
  const int first = s.regime == Regime::exact_keys ? 0 : s.keys.rows;
  const int own = s.regime == Regime::exact_keys ? s.keys.rows : s.pinned;
  const Rows<const T> value = key_rows<const T>(f.value, s, f.value_dim);
  elements(own, width, [&](int i, int j) {
    core.w().at(first + i, j) = j < value.columns ? to_acc(value.row(i)[j * value.feature]) : A(0);
  });
}

}  // namespace nystrom_ext::cuda
