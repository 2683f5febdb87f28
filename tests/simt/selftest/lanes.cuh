// Which lane holds what after a warp's operations. Each returns how many values differ from a formula.
//
// The layouts of ldmatrix and mma are those that CuTe gives as strides over (lane, register, half) in Copy_Traits of
// SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T, MMA_Traits of SM80_16x8x16_F32BF16BF16F32_TN.
#pragma once

#include "simt.h"

namespace selftest {

inline __device__ uint32_t half_of(uint32_t x, int h) { return h ? x >> 16 : x & 0xffffu; }

inline __global__ void ldmatrix_lanes(int* wrong) {
  auto* const shared = static_cast<uint16_t*>(simt::dynamic_smem());
  const int lane = int(threadIdx.x);
  int count = 0;
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = uint16_t(lane * 8 + i);
  __syncwarp();
  for (const bool trans : {false, true}) {
    uint32_t r[4];
    simt::ldmatrix_x4(r, shared + lane * 8, trans);
    for (int v = 0; v < 4; ++v) {
      for (int h = 0; h < 2; ++h) {
        const int straight = lane * 2 + h + v * 64, turned = lane % 4 * 16 + lane / 4 + h * 8 + v * 64;
        count += half_of(r[v], h) != uint32_t(trans ? turned : straight);
      }
    }
  }
  wrong[lane] = count;
}

// Small integers, exact in bf16.
inline __device__ float left(int m, int k) { return float((m * 7 + k * 3 + m * k) % 11 - 5); }
inline __device__ float right(int k, int n) { return float((k * 5 + n * 2 + n * k) % 9 - 4); }
inline __device__ uint32_t pack(float low, float high) { return __float_as_uint(low) >> 16 | __float_as_uint(high); }

inline __global__ void mma_lanes(int* wrong) {
  const int lane = int(threadIdx.x), base = lane % 4 * 32 + lane / 4;
  uint32_t a[4], b[2];
  for (int v = 0; v < 4; ++v) {
    const int i = base + v % 2 * 8 + v / 2 * 128;
    a[v] = pack(left(i % 16, i / 16), left(i % 16, i / 16 + 1));
  }
  for (int v = 0; v < 2; ++v) {
    const int i = lane % 4 * 16 + lane / 4 + v * 64;
    b[v] = pack(right(i / 8, i % 8), right(i / 8 + 1, i % 8));
  }
  float c[4] = {0, 1, 2, 3};
  simt::mma_bf16(c, a, b[0], b[1]);
  int count = 0;
  for (int e = 0; e < 4; ++e) {
    const int i = base + e % 2 * 16 + e / 2 * 8;
    float sum = float(e);
    for (int k = 0; k < 16; ++k) sum += left(i % 16, k) * right(k, i / 16);
    count += sum != c[e];
  }
  wrong[lane] = count;
}

inline __global__ void shuffle_lanes(int* wrong) {
  const int lane = int(threadIdx.x);
  int count = 0;
  for (int width = 2; width <= 32; width *= 2) {
    const int begin = lane / width * width, at = lane - begin;
    for (int d = 0; d < width; ++d) {
      count += __shfl_sync(~0u, lane, d, width) != begin + d;
      count += __shfl_sync(~0u, lane, at + d, width) != begin + (at + d) % width;
      count += __shfl_up_sync(~0u, lane, unsigned(d), width) != (at >= d ? lane - d : lane);
      count += __shfl_down_sync(~0u, lane, unsigned(d), width) != (at + d < width ? lane + d : lane);
      count += __shfl_xor_sync(~0u, lane, d, width) != (lane ^ d);
    }
  }
  const double wide = __shfl_xor_sync(~0u, lane + 1 / 3., 5);
  count += wide != (lane ^ 5) + 1 / 3.;
  count += __ballot_sync(~0u, lane % 3 == 0) != 0x49249249u;
  count += !__any_sync(~0u, lane == 7) || __any_sync(~0u, 0) || __all_sync(~0u, lane != 7) || !__all_sync(~0u, 1);
  if (lane < 16) {  // halves of a warp may go apart
    count += __shfl_xor_sync(0xffffu, lane, 1) != (lane ^ 1);
    __syncwarp(0xffffu);
  } else {
    __syncwarp(0xffff0000u);
    count += __ballot_sync(0xffff0000u, lane & 1) != 0xaaaa0000u;
  }
  __syncwarp();
  wrong[lane] = count;
}

}  // namespace selftest
