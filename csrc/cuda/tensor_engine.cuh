// The tensor-core engine: tile products of bf16 and half tokens on mma.sync, head dims up to D.
//
// An engine is what a sweep (key pass, query pass, and their backward passes) is written over: a block holds kRows rows
// against kCols columns at a time, multiplies row tiles by column tiles into an Accumulator, and an Accumulator, as
// probabilities, by column tiles into another. The other engine is scalar_engine.cuh.
//
// Every product is of bf16 terms with fp32 sums. What bf16 cannot hold is a pair hi + lo of them: the m-sized operands
// (landmarks, U, W and their gradients, kept in fp32), half tokens (exactly), probabilities, and their gradients where
// tokens are half. The term lo * lo is dropped.
#pragma once

#include "sample.cuh"

namespace nystrom_ext::cuda {

// Tiles as large as the registers allow without a spill: half tokens, being pairs, take more.
template <class T>
constexpr int kColumnsFor(int D) {
  return (D <= 64 ? 64 : 32) / (std::is_same_v<T, half> ? 2 : 1);
}

template <class T>
constexpr int kOutFor(int D) {
  return D <= 128 ? D : std::is_same_v<T, half> ? 64 : 128;
}

template <class T_, int D, int kCols_ = kColumnsFor<T_>(D), int kOut_ = kOutFor<T_>(D)>
struct TensorEngine {
  using T = T_;
  using Acc = float;
  // The key pass, and the sweeps that need registers for two outputs.
  using KeyTiles = TensorEngine<T, D, D <= 64 ? 64 : 32, D <= 128 ? D : 64>;
  static constexpr int kSharedOut = D <= 64 ? D : D == 128 ? 64 : 32;
  using Narrow = TensorEngine<T, D, 32, kSharedOut>;
  using Narrowest = TensorEngine<T, D, D <= 64 ? kColumnsFor<T>(D) / 2 : 16, kSharedOut>;
  // Beside a window there is room for less, and for half tokens of more than 128 features for none.
  static constexpr bool kTakesWindow = D <= 128 || !std::is_same_v<T, half>;
  using Small = Narrowest;
  static constexpr int kWindowOut = D >= (std::is_same_v<T, half> ? 64 : 128) ? 32 : kSharedOut;
  using NarrowBesideWindow = TensorEngine<T, D, std::is_same_v<T, half> ? 16 : 32, kWindowOut>;
  using NarrowestBesideWindow = TensorEngine<T, D, 16, kWindowOut>;
  static constexpr bool kWindow = false;
  static constexpr int kThreads = 128, kBlocks = 2, kRows = 64, kCols = kCols_;
  static constexpr int kOut = kOut_;  // columns of one output tile; wider outputs take several blocks
  static constexpr int kRowsPerThread = 2;
  static constexpr int kTokenTerms = std::is_same_v<T, half> ? 2 : 1;
  static constexpr int kStages = D <= 64 ? 2 : 1;  // token tiles in flight
  // bytes of shared memory
  static constexpr int kTokenTile = 2 * D;     // per row
  static constexpr int kLandmarkTile = 4 * D;  // per row: hi and lo
  // for the convolution, per warp: 16 rows of a window, and a 16 x 16 tile
  static __host__ __device__ constexpr int scratch(bool convolution) {
    return convolution ? 4 * (16 * kOut * 2 + 16 * 17 * 4) : 0;
  }

  static __device__ int lane() { return threadIdx.x & 31; }
  static __device__ int warp_row() { return int(threadIdx.x >> 5) * 16; }

  template <int N>
  struct Accumulator {  // kRows x N; x[n][e]: row e / 2 and column e % 2 of this thread in columns 8n .. 8n + 7
    static constexpr int kColumns = N / 4;  // per thread
    float x[N / 8][4] = {};
    __device__ float& at(int i, int j) { return x[j / 2][2 * i + (j & 1)]; }
  };
  using Scores = Accumulator<kCols>;
  using Output = Accumulator<kOut>;

  // Row i and column j of this thread.
  static __device__ int row(int i) { return warp_row() + lane() / 4 + 8 * i; }
  static __device__ int column(int j) { return j / 2 * 8 + lane() % 4 * 2 + (j & 1); }
  static __device__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  }
  static __device__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
  static __device__ float exp2(float x) { return exp2_approx(x); }
  // x as a probability operand holds it.
  static __device__ float rounded(float x) { return kTokenTerms == 1 ? __bfloat162float(__float2bfloat16(x)) : x; }

  // Tiles are rows of D elements in chunks of 16 bytes, permuted so that ldmatrix meets no bank twice.
  static __device__ int at(int row, int chunk) { return row * D + ((chunk ^ (D >= 64 ? row & 7 : row >> 1 & 3)) << 3); }

  template <int N>
  struct Tokens {
    static constexpr int kTerms = kTokenTerms;
    const T* data;
    __device__ void terms(uint32_t (&f)[kTerms][4], int offset, bool trans) const {
      trans ? ldmatrix_x4_trans(f[0], data + offset) : ldmatrix_x4(f[0], data + offset);
      if constexpr (kTerms == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = __half22float2(bits<half2>(f[0][i]));
          split(v.x, v.y, f[0][i], f[1][i]);
        }
      }
    }
  };

  template <int N>
  struct Landmarks {
    static constexpr int kTerms = 2;
    const bf16* data;
    __device__ void terms(uint32_t (&f)[2][4], int offset, bool trans) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bf16* from = data + i * N * D + offset;
        trans ? ldmatrix_x4_trans(f[i], from) : ldmatrix_x4(f[i], from);
      }
    }
  };

  // Starts the copy of N ranks from `first` into a tile; rows from `count` on and columns beyond the operand are zeros.
  template <int N>
  static __device__ void load(char* tile, const Rows<const T>& x, int first, int count) {
    for (int i = threadIdx.x; i < N * D / 8; i += kThreads) {
      const int r = i / (D / 8), c = i % (D / 8);
      const bool valid = r < count && 8 * c < x.columns;
      cp_async16(reinterpret_cast<T*>(tile) + at(r, c), valid ? x.row(first + r) + 8 * c : x.data, valid);
    }
  }
  static __device__ void commit() { cp_async_commit(); }
  template <int kPending>
  static __device__ void wait() {
    cp_async_wait<kPending>();
  }
  template <int N>
  static __device__ Tokens<N> tokens(const char* tile, const Rows<const T>&, int, int) {
    return {reinterpret_cast<const T*>(tile)};
  }

  // Rows first .. first + N - 1 of an m-sized operand (rows, width); zeros beyond.
  template <int N>
  static __device__ void load(char* tile, const float* x, int width, int first, int rows) {
    bf16* hi = reinterpret_cast<bf16*>(tile);
    for (int i = threadIdx.x; i < N * D / 8; i += kThreads) {
      const int r = i / (D / 8), c = i % (D / 8);
      uint32_t h[4] = {}, l[4] = {};
      if (first + r < rows && 8 * c < width) {
        const float4* from = reinterpret_cast<const float4*>(x + int64_t(first + r) * width + 8 * c);
        const float4 a = from[0], b = from[1];
        split(a.x, a.y, h[0], l[0]);
        split(a.z, a.w, h[1], l[1]);
        split(b.x, b.y, h[2], l[2]);
        split(b.z, b.w, h[3], l[3]);
      }
      *reinterpret_cast<uint4*>(hi + at(r, c)) = make_uint4(h[0], h[1], h[2], h[3]);
      *reinterpret_cast<uint4*>(hi + N * D + at(r, c)) = make_uint4(l[0], l[1], l[2], l[3]);
    }
  }
  template <int N>
  static __device__ Landmarks<N> landmarks(const char* tile, const float*, int, int, int) {
    return {reinterpret_cast<const bf16*>(tile)};
  }

  template <int kA, int kB>
  static __device__ void multiply(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[kA][4],
                                  const uint32_t (&b)[kB][4]) {
#pragma unroll
    for (int i = kA - 1; i >= 0; --i) {
#pragma unroll
      for (int j = kB - 1; j >= 0; --j) {
        if (i + j > 1) continue;
        mma_bf16(c0, a[i], b[j][0], b[j][1]);
        mma_bf16(c1, a[i], b[j][2], b[j][3]);
      }
    }
  }

  // a b^T over the features: a has kRows rows, b kCols.
  template <class Rows, class Columns>
  static __device__ Scores scores(const Rows& a, const Columns& b, char*) {
    Scores s;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t fa[Rows::kTerms][4];
      a.terms(fa, at(warp_row() + (lane() & 15), 2 * k + (lane() >> 4)), false);
#pragma unroll
      for (int n = 0; n < kCols / 16; ++n) {
        uint32_t fb[Columns::kTerms][4];
        b.terms(fb, at(16 * n + (lane() & 7) + (lane() >> 4) * 8, 2 * k + (lane() >> 3 & 1)), false);
        multiply(s.x[2 * n], s.x[2 * n + 1], fa, fb);
      }
    }
    return s;
  }

  // out += p b, columns out0 .. out0 + kOut - 1 of b, with p of kTerms terms.
  template <int kTerms = kTokenTerms, class Columns>
  static __device__ void accumulate(Output& out, Scores& p, const Columns& b, int out0, char*) {
#pragma unroll
    for (int k = 0; k < kCols / 16; ++k) {
      uint32_t fp[kTerms][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float x = p.x[2 * k + r / 2][r % 2 * 2], y = p.x[2 * k + r / 2][r % 2 * 2 + 1];
        if constexpr (kTerms == 2) {
          split(x, y, fp[0][r], fp[1][r]);
        } else {
          fp[0][r] = pack<bf16>(x, y);
        }
      }
#pragma unroll
      for (int n = 0; n < kOut / 16; ++n) {
        uint32_t fb[Columns::kTerms][4];
        b.terms(fb, at(16 * k + (lane() & 15), out0 / 8 + 2 * n + (lane() >> 4)), true);
        multiply(out.x[2 * n], out.x[2 * n + 1], fp, fb);
      }
    }
  }

  // Columns out0 .. of ranks first .. first + count - 1.
  static __device__ void store(Output& out, const Rows<T>& x, int first, int count, int out0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row(i) >= count) continue;
      T* to = x.row(first + row(i)) + out0;
#pragma unroll
      for (int n = 0; n < kOut / 8; ++n) {
        if (out0 + 8 * n >= x.columns) break;
        *reinterpret_cast<uint32_t*>(to + column(2 * n)) = pack<T>(out.x[n][2 * i], out.x[n][2 * i + 1]);
      }
    }
  }
};

}  // namespace nystrom_ext::cuda
