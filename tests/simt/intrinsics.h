// CUDA's built-in names for g++: what the toolkit's headers declare to nvcc only.
#pragma once

#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __launch_bounds__(...)

// Without nvcc this would silently be a variable of each thread. Kernels take dynamic shared memory.
#undef __shared__
#define __shared__ static_assert(false, "static __shared__ memory is not emulated");

namespace simt {

struct Builtins {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Builtins builtins;  // of the thread that runs

enum class Shuffle { index, up, down, butterfly };
uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width);

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, int operand, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(kind, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline constexpr const uint3& threadIdx = simt::builtins.thread;
inline constexpr const uint3& blockIdx = simt::builtins.block;
inline constexpr const dim3& blockDim = simt::builtins.block_dim;
inline constexpr const dim3& gridDim = simt::builtins.grid_dim;
inline constexpr int warpSize = 32;

void __syncthreads();
void __syncwarp(uint32_t mask = ~0u);
uint32_t __ballot_sync(uint32_t mask, int predicate);
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
  return simt::shuffle(simt::Shuffle::index, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(simt::Shuffle::up, mask, value, int(delta), width);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(simt::Shuffle::down, mask, value, int(delta), width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32) {
  return simt::shuffle(simt::Shuffle::butterfly, mask, value, lanes, width);
}

// Both arguments of one type, or the host compiler rejects what nvcc may find ambiguous.
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }  // as in CUDA: a number wins over NaN
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(uint32_t(x)) : 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(uint32_t(bits)); }
