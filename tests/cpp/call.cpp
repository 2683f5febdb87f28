#include "call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace nystrom_test {
namespace {

// A binary floating-point format of 16 bits.
struct Format {
  int exponent_bits, mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
constexpr Format kBfloat16{8, 7}, kFloat16{5, 10};

uint16_t encode(const Format& f, double value) {
  const int ones = (1 << f.exponent_bits) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return uint16_t(sign | ones << f.mantissa_bits | 1 << (f.mantissa_bits - 1));
  const double size = std::abs(value);
  if (size == 0) return sign;
  const int exponent = std::max(std::isinf(size) ? f.bias() + 1 : std::ilogb(size), 1 - f.bias());
  // Units of the last place, to the nearest even; a carry moves on into the exponent by itself.
  const double units = exponent > f.bias() ? HUGE_VAL : std::nearbyint(std::ldexp(size, f.mantissa_bits - exponent));
  const int largest = ones << f.mantissa_bits;
  if (std::isinf(units)) return uint16_t(sign | largest);
  const int hidden = 1 << f.mantissa_bits, steps = (exponent + f.bias() - 1) * hidden + int(units);
  return uint16_t(sign | std::min(steps, largest));
}

double decode(const Format& f, uint16_t bits) {
  const int ones = (1 << f.exponent_bits) - 1, exponent = bits >> f.mantissa_bits & ones;
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  double size = exponent == 0 ? std::ldexp(mantissa, 1 - f.bias() - f.mantissa_bits)
                              : std::ldexp(mantissa | 1 << f.mantissa_bits, exponent - f.bias() - f.mantissa_bits);
  if (exponent == ones) size = mantissa ? std::numeric_limits<double>::quiet_NaN() : HUGE_VAL;
  return bits & 0x8000 ? -size : size;
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
int64_t accumulation_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

template <class T>
T get(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

char* address(const Operand& x, Dtype dtype, int64_t b, int64_t h, int64_t t, int64_t feature) {
  return static_cast<char*>(x.data) + (b * x.batch + h * x.head + t * x.token + feature * x.feature) * size_of(dtype);
}

}  // namespace

const char* name_of(Dtype dtype) {
  const char* const names[] = {"float64", "float32", "bfloat16", "float16"};
  return names[int(dtype)];
}

Call::Call(const Case& c, Dtype dtype) : dtype(dtype) {
  Problem& p = forward;
  p.dtype = dtype;
  p.batch = c.batch;
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.head_dim = c.head_dim;
  p.value_dim = c.value_dim;
  p.landmarks = c.landmarks;
  p.scale = 1 / std::sqrt(double(c.head_dim));
  p.dropout_p = c.dropout_p;
  p.global_coefficient = c.global_coefficient;
  p.window = std::min(c.window, c.keys);
  p.pinned = std::min(c.pinned, c.keys);
  auto* rng_state = static_cast<int64_t*>(allocate(16, true));
  rng_state[0] = 0x0123456789ABCDEF;
  rng_state[1] = 42;
  p.rng_state = c.dropout_p > 0 ? rng_state : nullptr;
  p.queries.landmarks = std::min(c.landmarks, c.queries);
  p.keys.landmarks = std::min(c.landmarks, c.keys);
  plan(p.keys, c.keys, c.mask);
  plan(p.queries, c.queries, c.mask);
  p.query = operand(c.heads, c.queries, c.head_dim, c.strided, false);
  p.key = operand(c.kv_heads, c.keys, c.head_dim, c.strided, false);
  p.value = operand(c.kv_heads, c.keys, c.value_dim, c.strided, false);
  fill(p.query, c.heads, c.head_dim, p.queries, 1);
  fill(p.key, c.kv_heads, c.head_dim, p.keys, 2);
  fill(p.value, c.kv_heads, c.value_dim, p.keys, 3);
  p.taps = c.taps;
  if (c.taps > 0) {
    p.conv_weight = {allocate(c.heads * c.taps * size_of(dtype), false), 0, c.taps, 1, 0};
    std::mt19937 engine(5);
    for (int64_t i = 0; i < c.heads * c.taps; ++i) {
      write(p.conv_weight, 0, 0, i, 0, std::normal_distribution<double>()(engine));
    }
  }

  const bool masked = c.mask != Mask::none;
  const bool uneven = masked || std::min(c.queries, c.keys) <= std::max(c.landmarks, p.pinned);
  const int64_t n = p.problems(), rows = p.queries.landmarks, d = p.head_width(), e = p.value_width();
  forward.out = operand(c.heads, c.queries, c.value_dim, false, masked);
  forward.qt = buffer(n * rows * d, uneven);
  forward.kt = buffer(n * p.columns() * d, uneven);
  forward.u = buffer(n * rows * e, uneven);
  forward.lse = buffer(n * rows, uneven);
  forward.w = buffer(n * p.columns() * e, uneven);
  forward.missed = buffer(p.extended() ? n * rows : 0, uneven);

  Backward& g = backward;
  static_cast<Forward&>(g) = forward;
  g.out = operand(c.heads, c.queries, c.value_dim, c.strided, false);
  fill(g.out, c.heads, c.value_dim, p.queries, 4);
  g.dquery = operand(c.heads, c.queries, c.head_dim, false, masked);
  g.dkey = operand(c.kv_heads, c.keys, c.head_dim, false, masked);
  g.dvalue = operand(c.kv_heads, c.keys, c.value_dim, false, masked);
  g.dconv = buffer(c.taps > 0 ? c.heads * c.taps : 0, true);
  g.dqt = buffer(n * rows * d);
  g.dkt = buffer(n * p.columns() * d);
  g.du = buffer(n * rows * e);
  g.dw = buffer(n * p.columns() * e);
  g.delta = buffer(n * rows);
  g.dmissed = buffer(p.extended() ? n * rows : 0);
  g.lse1 = buffer(p.window > 0 ? n * c.queries : 0);
  g.delta1 = buffer(p.window > 0 ? n * c.queries : 0);
}

void Call::want(const Wanted& wanted) {
  Backward& g = backward;
  g.wanted = wanted;
  if (!wanted.query) g.dquery = {}, g.dqt = nullptr;
  if (!wanted.key) g.dkey = {}, g.dkt = nullptr, g.delta1 = nullptr;
  if (!wanted.value) g.dvalue = {};
  if (!wanted.conv) g.dconv = nullptr;
  if (!wanted.tokens()) g.lse1 = nullptr;
  if (!wanted.scores()) g.delta = g.dmissed = nullptr;
  if (!wanted.attention()) g.du = g.dw = nullptr;
}

double Call::read(const Operand& x, int64_t b, int64_t h, int64_t t, int64_t feature) const {
  const char* p = address(x, dtype, b, h, t, feature);
  switch (dtype) {
    case Dtype::float64:
      return get<double>(p);
    case Dtype::float32:
      return get<float>(p);
    case Dtype::bfloat16:
      return decode(kBfloat16, get<uint16_t>(p));
    default:
      return decode(kFloat16, get<uint16_t>(p));
  }
}

void Call::write(const Operand& x, int64_t b, int64_t h, int64_t t, int64_t feature, double value) {
  char* p = address(x, dtype, b, h, t, feature);
  const float single = float(value);
  const uint16_t half = encode(dtype == Dtype::bfloat16 ? kBfloat16 : kFloat16, value);
  const void* const from = dtype == Dtype::float64   ? static_cast<const void*>(&value)
                           : dtype == Dtype::float32 ? static_cast<const void*>(&single)
                                                     : static_cast<const void*>(&half);
  std::memcpy(p, from, size_t(size_of(dtype)));
}

double Call::read(const void* buffer, int64_t i) const {
  return dtype == Dtype::float64 ? static_cast<const double*>(buffer)[i] : static_cast<const float*>(buffer)[i];
}

void Call::write(void* buffer, int64_t i, double value) {
  if (dtype == Dtype::float64) {
    static_cast<double*>(buffer)[i] = value;
  } else {
    static_cast<float*>(buffer)[i] = float(value);
  }
}

void* Call::allocate(int64_t bytes, bool zero) {
  memory_.emplace_back(new char[size_t(bytes)]);
  std::memset(memory_.back().get(), zero ? 0 : 0xFF, size_t(bytes));  // all ones: NaN in each of the types
  return memory_.back().get();
}

void* Call::buffer(int64_t elements, bool zero) { return allocate(elements * accumulation_size(dtype), zero); }

Operand Call::operand(int64_t heads, int64_t tokens, int64_t features, bool strided, bool zero) {
  const int64_t feature = strided ? 2 : 1, token = heads * features * feature;
  void* data = allocate(forward.batch * tokens * token * size_of(dtype), zero);
  return {data, tokens * token, features * feature, token, feature};
}

void Call::plan(Tokens& side, int64_t length, Mask mask) {
  const int64_t batch = forward.batch;
  auto* ignored = static_cast<bool*>(allocate(batch * length, true));
  auto* index = static_cast<int64_t*>(allocate(batch * length * 8, true));
  auto* count = static_cast<int64_t*>(allocate(batch * 8, true));
  auto* offsets = static_cast<int64_t*>(allocate(batch * (side.landmarks + 1) * 8, true));
  std::mt19937 engine(6);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tail = length - int64_t(engine() % uint64_t(length));
    for (int64_t i = 0; i < length; ++i) {
      bool& x = ignored[b * length + i];
      x = mask == Mask::holes ? engine() % 10 < 3 : mask != Mask::none && i >= tail;
      if (mask == Mask::all && b == 0) x = true;
      if (!x) index[b * length + count[b]++] = i;
    }
    const int64_t segments = std::min(count[b], side.landmarks);
    for (int64_t j = 0; j <= segments && segments > 0; ++j) {
      offsets[b * (side.landmarks + 1) + j] = j * count[b] / segments;
    }
  }
  side.length = length;
  side.count = count;
  side.offsets = offsets;
  side.index = mask == Mask::none ? nullptr : index;
  side.ignored = mask == Mask::none ? nullptr : ignored;
}

void Call::fill(const Operand& x, int64_t heads, int64_t features, const Tokens& tokens, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  for (int64_t b = 0; b < forward.batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t t = 0; t < tokens.length; ++t) {
        const bool ignored = tokens.ignored && tokens.ignored[b * tokens.length + t];
        for (int64_t i = 0; i < features; ++i) {
          const double value = normal(engine);
          if (!ignored) write(x, b, h, t, i, value);
        }
      }
    }
  }
}

std::vector<double> Call::values(const Operand& x, int64_t heads, int64_t tokens, int64_t features) const {
  std::vector<double> all;
  for (int64_t b = 0; b < forward.batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < features; ++i) all.push_back(read(x, b, h, t, i));
      }
    }
  }
  return all;
}

}  // namespace nystrom_test
