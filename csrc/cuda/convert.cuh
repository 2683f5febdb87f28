// Storage types and the type they are computed in; bf16 pairs.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.cuh"

namespace nystrom_ext::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using AccOf = typename Accumulation<T>::type;

template <class T>
__device__ __forceinline__ AccOf<T> to_acc(T x) {
  if constexpr (sizeof(T) > 2) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __bfloat162float(x);
  } else {
    return __half2float(x);
  }
}

template <class T>
__device__ __forceinline__ T from_acc(AccOf<T> x) {
  if constexpr (sizeof(T) > 2) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16(x);
  } else {
    return __float2half(x);
  }
}

template <class To, class From>
__device__ __forceinline__ To bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(static_cast<void*>(&y), &x, sizeof(To));
  return y;
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bits<uint32_t>(__floats2bfloat162_rn(low, high));
  } else {
    return bits<uint32_t>(__floats2half2_rn(low, high));
  }
}
__device__ __forceinline__ float low_bf16(uint32_t x) { return bits<float>(x << 16); }
__device__ __forceinline__ float high_bf16(uint32_t x) { return bits<float>(x & 0xffff0000u); }

// x = hi + lo to 16 bits of mantissa; exact for values that were half.
__device__ __forceinline__ void split(float x, float y, uint32_t& hi, uint32_t& lo) {
  hi = pack<bf16>(x, y);
  lo = pack<bf16>(x - low_bf16(hi), y - high_bf16(hi));
}

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

}  // namespace nystrom_ext::cuda
