// A tile product in the manner of real kernels: two stages of cp.async, XOR swizzle, ldmatrix, mma, results through
// shared memory. With a defect of choice.
#pragma once

#include "simt.h"

namespace selftest {

enum class Defect {
  none,
  missing_barrier,
  missing_refill_barrier,
  missing_wait,
  wait_after_barrier,
  missing_syncwarp,
  no_swizzle,
  swizzled_writes_only,
  load_tail,
  store_tail,
  overlapping_blocks,
  short_shared_memory,
  divergent_shuffle,
  skipped_barrier,
  early_exit,
  uninitialised_read,
  narrow_mask,
  read_before_wait,
  source_overwritten,
  unawaited_copy,
  misaligned_copy,
  misaligned_row,
  shared_overrun,
  other_stack,
};

constexpr int kTile = 64, kChunk = 8, kChunks = kTile / kChunk;  // elements; a chunk has 16 bytes
constexpr int kTileElements = kTile * kTile, kProductThreads = 128;
constexpr size_t kProductShared = 4 * kTileElements * sizeof(uint16_t);

// c (rows, columns) = a (rows, depth) b^T, b (columns, depth), row-major bf16; depth and columns are multiples of
// kTile.
struct Product {
  const uint16_t *a, *b;
  float* c;
  int rows, columns, depth;
};

template <Defect kDefect>
__device__ int element_of(int row, int chunk, bool reads) {
  const bool plain = kDefect == Defect::no_swizzle || (kDefect == Defect::swizzled_writes_only && reads);
  return row * kTile + (plain ? chunk : chunk ^ (row & 7)) * kChunk;
}

// Rows beyond `valid` are zeros.
template <Defect kDefect>
__device__ void load_tile(uint16_t* tile, const uint16_t* from, int stride, int valid) {
  if (kDefect == Defect::load_tail) ++valid;
  for (int i = int(threadIdx.x); i < kTile * kChunks; i += kProductThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool inside = row < valid;
    simt::cp_async16(tile + element_of<kDefect>(row, chunk, false), from + (inside ? row * stride + chunk * kChunk : 0),
                     inside);
  }
}

template <Defect kDefect>
__device__ void multiply(const uint16_t* a, const uint16_t* b, int first_row, float (&sum)[kTile / 8][4]) {
  const int lane = int(threadIdx.x) % 32;
  for (int k = 0; k < kTile / 16; ++k) {
    uint32_t left[4];
    simt::ldmatrix_x4(left, a + element_of<kDefect>(first_row + lane % 16, 2 * k + lane / 16, true), false);
    for (int n = 0; n < kTile / 16; ++n) {
      uint32_t right[4];
      const int row = 16 * n + lane % 8 + lane / 16 * 8;
      simt::ldmatrix_x4(right, b + element_of<kDefect>(row, 2 * k + lane / 8 % 2, true), false);
      simt::mma_bf16(sum[2 * n], left, right[0], right[1]);
      simt::mma_bf16(sum[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// A warp's 16 rows, by way of its part of shared memory, so that each lane stores 16 bytes at a time.
template <Defect kDefect>
__device__ void store(const Product& p, float* staged, int column, const float (&sum)[kTile / 8][4]) {
  const int lane = int(threadIdx.x) % 32, first_row = int(threadIdx.x) / 32 * 16;
  for (int n = 0; n < kTile / 8; ++n) {
    for (int e = 0; e < 4; ++e) {
      staged[(first_row + lane / 4 + e / 2 * 8) * kTile + 8 * n + lane % 4 * 2 + e % 2] = sum[n][e];
    }
  }
  if (kDefect != Defect::missing_syncwarp) __syncwarp();
  for (int i = lane; i < 16 * kTile / 4; i += 32) {
    const int row = first_row + i / (kTile / 4), at = i % (kTile / 4) * 4;
    if (kDefect == Defect::store_tail ? row > p.rows : row >= p.rows) continue;
    *reinterpret_cast<float4*>(p.c + row * p.columns + column + at) =
        *reinterpret_cast<const float4*>(staged + row * kTile + at);
  }
}

template <Defect kDefect>
__global__ void __launch_bounds__(kProductThreads) product(Product p) {
  auto* const shared = static_cast<uint16_t*>(simt::dynamic_smem());
  const int column = kDefect == Defect::overlapping_blocks ? 0 : int(blockIdx.x) * kTile;
  const auto load_stage = [&](int step) {
    uint16_t* stage = shared + step % 2 * 2 * kTileElements;
    load_tile<kDefect>(stage, p.a + step * kTile, p.depth, p.rows);
    load_tile<kDefect>(stage + kTileElements, p.b + column * p.depth + step * kTile, p.depth, kTile);
  };
  float sum[kTile / 8][4] = {};
  const int steps = p.depth / kTile;
  load_stage(0);
  simt::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load_stage(step + 1);
    simt::cp_async_commit();
    if (kDefect == Defect::wait_after_barrier) __syncthreads();
    if (kDefect != Defect::missing_wait) simt::cp_async_wait(1);
    if (kDefect != Defect::missing_barrier && kDefect != Defect::wait_after_barrier) __syncthreads();
    const uint16_t* stage = shared + step % 2 * 2 * kTileElements;
    multiply<kDefect>(stage, stage + kTileElements, int(threadIdx.x) / 32 * 16, sum);
    if (kDefect != Defect::missing_refill_barrier) __syncthreads();
  }
  simt::cp_async_wait(0);
  store<kDefect>(p, reinterpret_cast<float*>(shared), column, sum);
}

}  // namespace selftest
