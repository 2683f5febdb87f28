// Parts that the sweeps share: token tiles on their way to shared memory, m-sized operands as column tiles, the online
// softmax.
#pragma once

#include "scalar_engine.cuh"
#include "tensor_engine.cuh"
#include "tiling.h"

namespace nystrom_ext::cuda {

constexpr float kInfinity = __builtin_huge_valf();

// Tiles of N tokens of one or two operands, ranks begin .. end - 1; the next tile is under way while one is in use.
template <class E, int N, int kOperands>
struct TokenStream {
  using Source = Rows<const typename E::T>;
  static constexpr int kTile = N * E::kTokenTile;
  static constexpr int kBytes = E::kStages * kOperands * kTile;

  Source x[kOperands];
  int begin, end;
  char* memory;

  __device__ char* slot(int operand, int first) const {
    return memory + ((first - begin) / N % E::kStages * kOperands + operand) * kTile;
  }
  __device__ void fetch(int first) const {
    for (int i = 0; i < kOperands && first < end; ++i) {
      E::template load<N>(slot(i, first), x[i], first, end - first);
    }
    E::commit();
  }
  __device__ void start() const {
    if (E::kStages == 2) fetch(begin);
  }
  // Waits for the tile at `first`; after it, done().
  __device__ void next(int first) const {
    fetch(E::kStages == 2 ? first + N : first);
    E::template wait<E::kStages - 1>();
    __syncthreads();
  }
  __device__ auto tile(int operand, int first) const {
    return E::template tokens<N>(slot(operand, first), x[operand], first, min(end - first, N));
  }
  static __device__ void done() {
    if (E::kTokenTile) __syncthreads();  // all have read the tile: it may be refilled
  }
};

// Rows of an m-sized operand of one head.
template <class A>
struct Buffer {
  const A* data;
  int width, rows;
};

// Two m-sized operands as column tiles. With room for all tiles each is loaded once per block.
template <class E>
struct ColumnTiles {
  using A = typename E::Acc;
  static constexpr int kTile = E::kCols * E::kLandmarkTile;

  Buffer<A> a, b;
  char* memory;
  int slots;
  int loaded = 0;  // tiles 0 .. loaded - 1 are in their slots

  __device__ char* end() const { return memory + 2 * slots * kTile; }
  __device__ int tiles() const { return (a.rows + E::kCols - 1) / E::kCols; }
  __device__ char* slot(int j, int operand) const { return memory + (j % slots * 2 + operand) * kTile; }

  __device__ void load(int j) {
    if (!E::kLandmarkTile || (j < loaded && tiles() <= slots)) return;
    __syncthreads();
    E::template load<E::kCols>(slot(j, 0), a.data, a.width, j * E::kCols, a.rows);
    E::template load<E::kCols>(slot(j, 1), b.data, b.width, j * E::kCols, b.rows);
    __syncthreads();
    loaded = j + 1;
  }
  __device__ auto first(int j) const {
    return E::template landmarks<E::kCols>(slot(j, 0), a.data, a.width, j * E::kCols, a.rows);
  }
  __device__ auto second(int j) const {
    return E::template landmarks<E::kCols>(slot(j, 1), b.data, b.width, j * E::kCols, b.rows);
  }
};

// Calls f(i, j, x) for every element of an accumulator that this thread owns.
template <class Accumulator, class F>
__device__ __forceinline__ void for_each(Accumulator& a, int rows_per_thread, F f) {
#pragma unroll
  for (int i = 0; i < rows_per_thread; ++i) {
#pragma unroll
    for (int j = 0; j < Accumulator::kColumns; ++j) f(i, j, a.at(i, j));
  }
}

// P from a logit and LSE, in units of log2. Never above 1: the two come from different sums, and where they exceed
// 1 / epsilon rounding alone would make P infinite. NaN stays.
template <class E>
__device__ typename E::Acc probability(typename E::Acc logit, typename E::Acc lse) {
  const typename E::Acc x = logit - lse;
  return E::exp2(x > 0 ? typename E::Acc(0) : x);
}

// Softmax of rows whose columns arrive tile by tile, in units of log2.
template <class E>
struct Softmax {
  using A = typename E::Acc;
  static constexpr int R = E::kRowsPerThread;
  A max[R], sum[R], shrink[R];  // shrink: what the last tile's maximum makes of earlier sums

  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < R; ++i) max[i] = A(-kInfinity), sum[i] = 0, shrink[i] = 0;
  }

  // s = logits, -infinity where there is no column, becomes exp2(s - max).
  __device__ void add(typename E::Scores& s) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      A top = max[i];
#pragma unroll
      for (int j = 0; j < E::Scores::kColumns; ++j) top = s.at(i, j) > top ? s.at(i, j) : top;
      top = E::row_max(top);
      const A base = top > A(-kInfinity) ? top : A(0);  // no column yet: a window that the row does not reach
      shrink[i] = E::exp2(max[i] - base);
      max[i] = top;
      A total = 0;
#pragma unroll
      for (int j = 0; j < E::Scores::kColumns; ++j) total += s.at(i, j) = E::exp2(s.at(i, j) - base);
      sum[i] = sum[i] * shrink[i] + E::row_sum(total);
    }
  }

  template <class Accumulator>
  __device__ void rescale(Accumulator& x) const {
    for_each(x, R, [&](int i, int, A& v) { v *= shrink[i]; });
  }
};

}  // namespace nystrom_ext::cuda
