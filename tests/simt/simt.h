// Runs CUDA kernels on the CPU: their own source, compiled by g++ against this header. README.md says what it checks.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "intrinsics.h"

namespace simt {

// ---- launch side

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  uint32_t seed = 0;  // 0: everything in order, copies land at their wait. Else: random blocks, warps, lanes, copies
  size_t max_smem = 232448;  // a block's largest dynamic shared memory: sm_90's
};
Options& options();

struct Stats {
  uint64_t launches, barriers, mma, ldmatrix;
  uint64_t ldmatrix_conflicts;  // pairs of rows of one 8 x 8 matrix that share banks
  uint64_t checked;             // accesses that the race mode looked at
};
Stats& stats();  // since the last reset
void reset_stats();

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*kernel)(const void* parameters);
  const void* parameters;
};
void run(const Launch&);  // throws Error; the emulator remains usable

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... arguments) {
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  const Call call(kernel, std::tuple<P...>(std::forward<A>(arguments)...));
  const auto body = [](const void* p) {
    std::apply(static_cast<const Call*>(p)->first, static_cast<const Call*>(p)->second);
  };
  run({grid, block, shared_bytes, body, &call});
}

// ---- instructions that have no CUDA function. All lanes of a warp together, except for the copies.

// c (16 x 8) += a (16 x 16) b (16 x 8), bf16 in, fp32 out.
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool trans);

// 16 bytes from global to shared memory; zeros where not `valid`, and the source is not read.
void cp_async16(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

void* dynamic_smem();

}  // namespace simt
