// C = alpha A B (+ C) for tiles that live in the caches: the one matrix product of the CPU kernels.
//
// B and C are row-major and their widths are multiples of kRowAlign, so every vector is full. A is read element by
// element and broadcast, so it may be stored by rows or by columns (`Transposed`) at no cost. Each element of C is
// summed over k in order, whatever rows surround it: results do not depend on how rows are grouped into tiles.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace {

using nystrom_ext::kRowAlign;

// Register tile: rows x vectors of C, 12 of 16 vector registers. AVX-512 has 32: 24 of them, with four vectors beside
// six rows wherever the width allows, because a tile then loads least for its products and six rows need no more
// pointers than there are registers.
constexpr bool kWide = NYSTROM_VECTOR_BYTES == 64;
constexpr int kTileVectors = kWide ? 4 : 2;
template <int C>
constexpr int kRows = !kWide   ? 6
                      : C == 1 ? 12
                               : 24 / C;
// Rows of queries or keys that a pass works on at a time: a multiple of kRows whose tiles stay in L2.
constexpr int64_t kBlock = 96;
constexpr int64_t kDepth = kWide ? 128 : 256;  // k per panel: at most 32 KB of float in L1

// While a product runs, asks for what the next ones need: in the same place of the next block, the rows of an operand
// of tokens (A, or B where A is transposed), which may come from memory and are too short for the processor to foresee,
// once (`Ask`); and the rows of C. For operands in the caches it asks for nothing useful, at the price of a load.
template <class A, int R, int C, bool Transposed, bool Ask>
inline void look_ahead(int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, const A* c, int64_t ldc) {
  constexpr int64_t kLine = 64 / sizeof(A), kWidth = C * Simd<A>::width;
  if constexpr (Ask && Transposed) {
    for (int64_t j = 0; j < kWidth; j += kLine) __builtin_prefetch(b + (kBlock + k) * ldb + j);
  } else if constexpr (Ask) {
    for (int64_t i = k % kLine; i < R; i += kLine) __builtin_prefetch(a + (kBlock + i) * lda + k / kLine * kLine);
  }
  if (k >= R) return;
  for (int64_t j = 0; j < kWidth; j += kLine) __builtin_prefetch(c + k * ldc + j, 1);
}

template <class A, int R, int C, bool Transposed, bool Ask = false>
inline void micro(int64_t K, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, A alpha, bool add) {
  constexpr int W = Simd<A>::width;
  Vec<A> acc[R][C] = {};
  for (int64_t k = 0; k < K; ++k) {
    look_ahead<A, R, C, Transposed, Ask>(k, a, lda, b, ldb, c, ldc);
    Vec<A> row[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) row[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const A x = Transposed ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      A* p = c + i * ldc + j * W;
      store(p, add ? load(p) + alpha * acc[i][j] : alpha * acc[i][j]);
    }
  }
}

// The last rows of a column of tiles: R = 1 .. kRows.
template <class A, int R, int C, bool Transposed>
inline void tail(int64_t rows, int64_t K, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, A alpha,
                 bool add) {
  if (rows == R) return micro<A, R, C, Transposed>(K, a, lda, b, ldb, c, ldc, alpha, add);
  if constexpr (R > 1) tail<A, R - 1, C, Transposed>(rows, K, a, lda, b, ldb, c, ldc, alpha, add);
}

// `first`: of the columns of tiles. It asks for the next rows of A, the first tile of each column for those of B.
template <class A, int C, bool Transposed>
inline void panel(int64_t M, int64_t K, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, A alpha,
                  bool add, bool first) {
  constexpr int R = kRows<C>;
  int64_t i = 0;
  for (; i + R <= M; i += R) {
    const A* rows = a + (Transposed ? i : i * lda);
    if (Transposed ? i == 0 : first) {
      micro<A, R, C, Transposed, true>(K, rows, lda, b, ldb, c + i * ldc, ldc, alpha, add);
    } else {
      micro<A, R, C, Transposed>(K, rows, lda, b, ldb, c + i * ldc, ldc, alpha, add);
    }
  }
  if (i < M) {
    tail<A, R, C, Transposed>(M - i, K, a + (Transposed ? i : i * lda), lda, b, ldb, c + i * ldc, ldc, alpha, add);
  }
}

// One column of tiles, in slices of kDepth so that the sum over k has one order whether B is copied or not.
template <class A, int C, bool Transposed>
inline void column(int64_t M, int64_t K, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, A alpha,
                   bool add, bool first) {
  constexpr int W = Simd<A>::width;
  // Rows of a wide B whose distance is a multiple of 256 bytes alias in L1; a contiguous copy does not. It pays unless
  // B stays in L1 or is read about once.
  const bool pack =
      ldb * int64_t(sizeof(A)) % 256 == 0 && K * ldb * int64_t(sizeof(A)) > 32768 && ldb > C * W && M > 28;
  alignas(64) A copy[kDepth * C * W];
  int64_t k0 = 0;
  do {
    const int64_t depth = K - k0 < kDepth ? K - k0 : kDepth;
    for (int64_t k = 0; pack && k < depth; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) store(copy + (k * C + j) * W, load(b + (k0 + k) * ldb + j * W));
    }
    panel<A, C, Transposed>(M, depth, a + (Transposed ? k0 * lda : k0), lda, pack ? copy : b + k0 * ldb,
                            pack ? int64_t(C * W) : ldb, c, ldc, alpha, add || k0 > 0, first);
    k0 += kDepth;
  } while (k0 < K);
}

template <int C>
struct Vectors {
  static constexpr int value = C;
};

// C (M, N) = alpha A (M, K) B (K, N), plus C if `add`. A is (K, M) in memory if Transposed. N % kRowAlign == 0.
template <bool Transposed, class A>
void gemm(int64_t M, int64_t N, int64_t K, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc,
          A alpha = A(1), bool add = false) {
  constexpr int W = Simd<A>::width;
  int64_t j = 0;
  const auto columns = [&](auto vectors, int64_t number) {
    constexpr int C = decltype(vectors)::value;
    for (; number > 0; --number, j += C * W) {
      column<A, C, Transposed>(M, K, a, lda, b + j, ldb, c + j, ldc, alpha, add, j == 0);
    }
  };
  if constexpr (kWide) {  // threes first, as many as leave fours
    int64_t threes = -(N / W) & 3;
    while (3 * threes * W > N) --threes;
    columns(Vectors<3>{}, threes);
  }
  columns(Vectors<kTileVectors>{}, (N - j) / (kTileVectors * W));
  columns(Vectors<2>{}, (N - j) / (2 * W));
  columns(Vectors<1>{}, (N - j) / W);
}

}  // namespace
