// The scalar engine: the same tile products by fused multiply-add, for float and double, and for 16-bit types whose
// size or alignment the tensor cores do not take. Any head dim. The interface is described in tensor_engine.cuh.
//
// Operands stay in global memory; a product walks them in slices of kSlice features through shared memory, and each of
// 16 x 16 threads owns four rows of four columns, or of kOut / 16.
#pragma once

#include "sample.cuh"

namespace nystrom_ext::cuda {

template <class T_, int kOut_ = sizeof(AccOf<T_>) == 8 ? 32 : 64>
struct ScalarEngine {
  using T = T_;
  using Acc = AccOf<T>;
  using KeyTiles = ScalarEngine;
  using Small = ScalarEngine;
  using Narrow = ScalarEngine<T, sizeof(Acc) == 8 ? 16 : 64>;  // for sweeps that need the registers for two outputs
  using Narrowest = Narrow;
  using NarrowBesideWindow = Narrow;
  using NarrowestBesideWindow = Narrow;
  static constexpr bool kWindow = false, kTakesWindow = true;
  static constexpr int kThreads = 256, kBlocks = 1, kRows = 64, kCols = 64, kOut = kOut_, kRowsPerThread = 4,
                       kStages = 1;
  static constexpr int kTokenTile = 0, kLandmarkTile = 0;   // nothing stays in shared memory
  static constexpr int kSlice = 16, kPitch = 68;            // 68: 16-byte rows whose columns fall on different banks
  static __host__ __device__ constexpr int scratch(bool) {  // a slice of each operand, and probabilities
    return (2 * kSlice + kCols) * kPitch * int(sizeof(Acc));
  }

  static __device__ int ty() { return threadIdx.x / 16; }
  static __device__ int tx() { return threadIdx.x % 16; }

  template <int N>
  struct Accumulator {
    static constexpr int kColumns = N / 16;
    Acc x[4][N / 16] = {};
    __device__ Acc& at(int i, int j) { return x[i][j]; }
  };
  using Scores = Accumulator<kCols>;
  using Output = Accumulator<kOut>;

  static __device__ int row(int i) { return 4 * ty() + i; }
  static __device__ int column(int j) { return tx() + 16 * j; }
  static __device__ Acc row_max(Acc x) {
    for (int lane = 1; lane < 16; lane *= 2) x = max(x, __shfl_xor_sync(~0u, x, lane));
    return x;
  }
  static __device__ Acc row_sum(Acc x) {
    for (int lane = 1; lane < 16; lane *= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
  }
  static __device__ float exp2(float x) { return exp2f(x); }
  static __device__ double exp2(double x) { return ::exp2(x); }
  static __device__ Acc rounded(Acc x) { return x; }

  template <int N>
  struct Tokens {
    Rows<const T> x;
    int first, count;
    __device__ int columns() const { return x.columns; }
    __device__ Acc get(int r, int c) const {
      return r < count && c < x.columns ? to_acc(x.row(first + r)[c * x.feature]) : Acc(0);
    }
  };

  template <int N>
  struct Landmarks {
    const Acc* x;
    int width, first, rows;
    __device__ int columns() const { return width; }
    __device__ Acc get(int r, int c) const {
      return first + r < rows && c < width ? x[int64_t(first + r) * width + c] : Acc(0);
    }
  };

  template <int N>
  static __device__ void load(char*, const Rows<const T>&, int, int) {}
  template <int N>
  static __device__ void load(char*, const Acc*, int, int, int) {}
  static __device__ void commit() {}
  template <int kPending>
  static __device__ void wait() {}
  template <int N>
  static __device__ Tokens<N> tokens(const char*, const Rows<const T>& x, int first, int count) {
    return {x, first, count};
  }
  template <int N>
  static __device__ Landmarks<N> landmarks(const char*, const Acc* x, int width, int first, int rows) {
    return {x, width, first, rows};
  }

  // c += a b for one slice: a and b hold kSlice rows of 64 elements.
  template <int N>
  static __device__ void multiply(Acc (&c)[4][N], const Acc* a, const Acc* b) {
#pragma unroll 2
    for (int k = 0; k < kSlice; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) c[i][j] += a[k * kPitch + row(i)] * b[k * kPitch + column(j)];
      }
    }
  }

  template <class A, class B>
  static __device__ Scores scores(const A& a, const B& b, char* scratch) {
    Acc* slice_a = reinterpret_cast<Acc*>(scratch);
    Acc* slice_b = slice_a + kSlice * kPitch;
    Scores s;
    for (int k = 0; k < a.columns(); k += kSlice) {
      for (int i = threadIdx.x; i < 64 * kSlice; i += kThreads) {
        const int r = i / kSlice, c = i % kSlice;
        slice_a[c * kPitch + r] = a.get(r, k + c);
        slice_b[c * kPitch + r] = b.get(r, k + c);
      }
      __syncthreads();
      multiply(s.x, slice_a, slice_b);
      __syncthreads();
    }
    return s;
  }

  template <int kTerms = 1, class B>
  static __device__ void accumulate(Output& out, Scores& p, const B& b, int out0, char* scratch) {
    Acc* slice = reinterpret_cast<Acc*>(scratch);
    Acc* pt = slice + 2 * kSlice * kPitch;  // p transposed
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) pt[column(j) * kPitch + row(i)] = p.x[i][j];
    }
#pragma unroll 1
    for (int k = 0; k < kCols; k += kSlice) {
      for (int i = threadIdx.x; i < kOut * kSlice; i += kThreads) {
        slice[i / kOut * kPitch + i % kOut] = b.get(k + i / kOut, out0 + i % kOut);
      }
      __syncthreads();
      multiply(out.x, pt + k * kPitch, slice);
      __syncthreads();
    }
  }

  static __device__ void store(Output& out, const Rows<T>& x, int first, int count, int out0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row(i) >= count) continue;
#pragma unroll
      for (int j = 0; j < Output::kColumns; ++j) {
        const int c = out0 + column(j);
        if (c < x.columns) x.row(first + row(i))[c * x.feature] = from_acc<T>(out.x[i][j]);
      }
    }
  }
};

}  // namespace nystrom_ext::cuda
