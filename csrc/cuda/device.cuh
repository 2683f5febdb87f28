// Everything a kernel uses beyond plain CUDA C++: one instruction per function, and the launch.
//
// Under the host compiler the same names come from the emulator of tests/simt, which runs the kernels' own source on a
// CPU. This file is all that it cannot vouch for, so it stays small.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include "simt.h"
#endif

namespace nystrom_ext::cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// c (16 x 8) += a (16 x 16) b (16 x 8), bf16 in, fp32 out.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory; zeros where not `valid`.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

template <class P>
void launch(void (*kernel)(P), dim3 grid, int threads, size_t shared_bytes, void* stream, const P& parameters) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared_bytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters);
}

#else

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { simt::mma_bf16(c, a, b0, b1); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { simt::ldmatrix_x4(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { simt::ldmatrix_x4(r, row, true); }
inline void cp_async16(void* shared, const void* global, bool valid) { simt::cp_async16(shared, global, valid); }
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  simt::cp_async_wait(kPending);
}
inline float exp2_approx(float x) { return exp2f(x); }
inline char* dynamic_shared_memory() { return static_cast<char*>(simt::dynamic_smem()); }

template <class P>
void launch(void (*kernel)(P), dim3 grid, int threads, size_t shared_bytes, void*, const P& parameters) {
  if (grid.x == 0 || grid.y == 0) return;
  simt::launch(kernel, grid, dim3(unsigned(threads)), shared_bytes, parameters);
}

#endif

}  // namespace nystrom_ext::cuda
