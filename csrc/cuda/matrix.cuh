// Products of small matrices by one block. The matrices lie in shared memory or, where there is no room, in global.
#pragma once

#include "sample.cuh"

namespace nystrom_ext::cuda {

template <class A>
struct View {
  A* data;
  int64_t row, column;  // strides
  __device__ A& at(int i, int j) const { return data[i * row + j * column]; }
};
template <class A>
__device__ View<A> transposed(const View<A>& x) {
  return {x.data, x.column, x.row};
}

// store(i, j, sum_k a_ik b_kj) for i < m, j < n. An element belongs to the same thread whatever is multiplied, so that
// products of one shape may add up in one place without a barrier between them.
template <class A, class Store>
__device__ void product(int m, int n, int k, const View<A>& a, const View<A>& b, Store store) {
  const int threads = blockDim.x / 16, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  for (int i0 = ty; i0 < m; i0 += 4 * threads) {
    for (int j0 = tx; j0 < n; j0 += 64) {
      A c[4][4] = {};
      int i[4], j[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        i[r] = min(i0 + r * threads, m - 1);
        j[r] = min(j0 + r * 16, n - 1);
      }
      for (int x = 0; x < k; ++x) {
        A u[4], v[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          u[r] = a.at(i[r], x);
          v[r] = b.at(x, j[r]);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int q = 0; q < 4; ++q) c[r][q] += u[r] * v[q];
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (i0 + r * threads < m && j0 + q * 16 < n) store(i[r], j[q], c[r][q]);
        }
      }
    }
  }
}

// f(i, j) for the elements of an (m, n) matrix, shared out to the block.
template <class F>
__device__ void elements(int m, int n, F f) {
  for (int x = threadIdx.x; x < m * n; x += blockDim.x) f(x / n, x % n);
}

// f(i) for m rows, each by one warp.
template <class F>
__device__ void warp_rows(int m, F f) {
  for (int i = threadIdx.x / 32; i < m; i += blockDim.x / 32) f(i, int(threadIdx.x % 32));
}

template <class A>
__device__ A warp_sum(A x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}
template <class A>
__device__ A warp_max(A x) {
  for (int lane = 16; lane > 0; lane /= 2) x = max(x, __shfl_xor_sync(~0u, x, lane));
  return x;
}

}  // namespace nystrom_ext::cuda
