// Small kernels, one idiom each, with a defect of choice.
#pragma once

#include "product.cuh"

namespace selftest {

// out[block] = sum of this block's x: shuffles within warps, shared memory between them.
template <Defect kDefect>
__global__ void reduce(const float* x, float* out) {
  auto* const sums = static_cast<float*>(simt::dynamic_smem());
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (kDefect == Defect::early_exit && warp + 1 == warps) return;
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (kDefect != Defect::divergent_shuffle || lane < 16) {
    for (unsigned step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  }
  if (lane == 0) sums[warp] = sum;
  if (kDefect != Defect::missing_barrier && !(kDefect == Defect::skipped_barrier && warp == 1)) __syncthreads();
  if (warp != 0) return;
  sum = lane < warps || kDefect == Defect::uninitialised_read ? sums[lane] : 0.f;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const unsigned to = kDefect == Defect::overlapping_blocks ? 0 : blockIdx.x;
  if (lane == 0) out[to] = sum;
}

// to = from, n elements over the whole grid.
template <Defect kDefect>
__global__ void copy(const float* from, float* to, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (kDefect == Defect::store_tail ? i <= n : i < n) to[i] = i < n ? from[i] : 0.f;
}

// to[i] = 2 from[n-1-i] for one block of n threads, through scratch in global memory.
template <Defect kDefect>
__global__ void reverse(const float* from, float* to, float* scratch) {
  const unsigned i = threadIdx.x;
  scratch[i] = 2 * from[i];
  if (kDefect != Defect::missing_barrier) __syncthreads();
  to[i] = scratch[blockDim.x - 1 - i];
}

// Like `reverse`, within groups of four lanes.
template <Defect kDefect>
__global__ void reverse_quads(const float* from, float* to) {
  auto* const shared = static_cast<float*>(simt::dynamic_smem());
  const unsigned i = threadIdx.x, pair = i % 32 / 2 * 2, quad = i % 32 / 4 * 4;
  shared[i] = 2 * from[i];
  if (kDefect == Defect::narrow_mask) {
    __syncwarp(0x3u << pair);
  } else if (kDefect != Defect::missing_syncwarp) {
    __syncwarp(0xfu << quad);
  }
  to[i] = shared[i ^ 3u];
}

// Each thread copies 16 bytes of its own through shared memory.
template <Defect kDefect>
__global__ void copy_async(float4* from, float4* to) {
  auto* const shared = static_cast<float4*>(simt::dynamic_smem());
  const unsigned i = threadIdx.x;
  const auto* source = reinterpret_cast<const char*>(from + i) + (kDefect == Defect::misaligned_copy ? 4 : 0);
  simt::cp_async16(shared + i, source, true);
  simt::cp_async_commit();
  if (kDefect == Defect::source_overwritten) {
    __syncthreads();
    from[(i + 1) % blockDim.x] = float4{0, 0, 0, 0};
  }
  if (kDefect != Defect::read_before_wait && kDefect != Defect::unawaited_copy) simt::cp_async_wait(0);
  if (kDefect != Defect::unawaited_copy) to[i] = shared[i];
  if (kDefect == Defect::read_before_wait) simt::cp_async_wait(0);
}

// to[i] = i over the grid's threads, counted x first.
inline __global__ void indices(int* to) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int i = int(block * blockDim.x * blockDim.y * blockDim.z + thread);
  __syncthreads();
  to[i] = i;
}

// Mistakes that end a launch wherever they happen.
template <Defect kDefect>
__global__ void break_rules(const float** shelf) {
  auto* const shared = static_cast<char*>(simt::dynamic_smem());
  const unsigned lane = threadIdx.x % 32;
  float own = 1;
  if (kDefect == Defect::misaligned_row || kDefect == Defect::short_shared_memory) {
    uint32_t r[4];
    const unsigned shift = kDefect == Defect::misaligned_row ? 8 : 16;
    simt::ldmatrix_x4(r, shared + lane * 16 + (lane == 31 ? shift : 0), false);
  }
  if (kDefect == Defect::shared_overrun) shared[512 + lane] = 1;
  if (kDefect == Defect::other_stack) {
    if (lane == 0) *shelf = &own;
    __syncthreads();
    if (lane == 1) own = **shelf;
    __syncthreads();
  }
}

}  // namespace selftest
