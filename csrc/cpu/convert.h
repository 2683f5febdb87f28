// Storage types and the accumulation type they are computed in: 16-bit values are converted on load and on store.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulation<T>::type;

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// The conversions below are written without branches over U = uint32_t and F = float, or over vectors of them.

template <class F, class U>
inline F decode(bfloat16*, U bits) {
  return bit_cast<F>(bits << 16);
}

// Normal numbers: move the exponent to float's bias by a multiplication. Subnormal ones: the mantissa as the low bits
// of 0.5, minus 0.5. Infinity and NaN come out right because the multiplication overflows into them.
template <class F, class U>
inline F decode(float16*, U bits) {
  const U sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7FFFu) << 13;
  const F normal = bit_cast<F>(magnitude + (0xE0u << 23)) * 0x1p-112f;
  const F subnormal = bit_cast<F>((magnitude >> 13) | (126u << 23)) - 0.5f;
  return bit_cast<F>(sign | (magnitude < (1u << 23) ? bit_cast<U>(subnormal) : bit_cast<U>(normal)));
}

// Round to nearest even; NaN keeps its sign and becomes quiet.
template <class F, class U>
inline U encode(bfloat16*, F x) {
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded;
}

// Adding a power of two 13 bits above the value's own exponent rounds the mantissa to half's; values under half's
// normal range are rounded at its fixed spacing 2^-24.
template <class F, class U>
inline U encode(float16*, F x) {
  const U bits = bit_cast<U>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const F scaled = bit_cast<F>(magnitude) * 0x1p+112f * 0x1p-110f;  // overflows to infinity where half does
  const U exponent = (bits << 1) & 0xFF000000u;
  const U base = exponent < 0x71000000u ? (exponent & 0u) | 0x71000000u : exponent;
  const U sum = bit_cast<U>(bit_cast<F>((base >> 1) + 0x07800000u) + scaled);
  const U half = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return (sign >> 16) | (magnitude > 0x7F800000u ? (half & 0u) | 0x7E00u : half);
}

typedef uint32_t UintVec __attribute__((vector_size(NYSTROM_VECTOR_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(NYSTROM_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class T>
inline Acc<T> to_acc(T x) {
  if constexpr (sizeof(T) == 2) {
    return decode<float, uint32_t>(static_cast<T*>(nullptr), uint32_t(x.bits));
  } else {
    return x;
  }
}
template <class T>
inline T from_acc(Acc<T> x) {
  if constexpr (sizeof(T) == 2) {
    return T{uint16_t(encode<float, uint32_t>(static_cast<T*>(nullptr), x))};
  } else {
    return x;
  }
}

// One vector of the accumulation type from contiguous storage, and back.
template <class T>
inline Vec<Acc<T>> load_as(const T* p) {
  if constexpr (sizeof(T) == 2) {
    const HalfVec bits = *reinterpret_cast<const HalfVec*>(p);
    return decode<Vec<float>, UintVec>(static_cast<T*>(nullptr), __builtin_convertvector(bits, UintVec));
  } else {
    return load(p);
  }
}
template <class T>
inline void store_as(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const UintVec bits = encode<Vec<float>, UintVec>(static_cast<T*>(nullptr), v);
    *reinterpret_cast<HalfVec*>(p) = __builtin_convertvector(bits, HalfVec);
  } else {
    store(p, v);
  }
}

// Half as the processor converts it by itself: the same numbers. (The masks keep GCC 12 from warning of its own
// header.)
#if defined(__F16C__) && NYSTROM_VECTOR_BYTES == 64
inline Vec<float> load_as(const float16* p) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_as(float16* p, Vec<float> v) {
  const __m256i bits = _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
#elif defined(__F16C__) && NYSTROM_VECTOR_BYTES == 32
inline Vec<float> load_as(const float16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_as(float16* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

}  // namespace
