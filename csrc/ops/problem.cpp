#include "problem.h"

#include <algorithm>

namespace nystrom_ext {
namespace {

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Dtype::float64;
    case at::kFloat:
      return Dtype::float32;
    case at::kBFloat16:
      return Dtype::bfloat16;
    default:
      return Dtype::float16;
  }
}

// More landmarks than any sequence has tokens, so that "exact whatever the length" may be said by the largest integer
// and kernels may still multiply the number.
constexpr int64_t kMostLandmarks = int64_t(1) << 30;

Tokens tokens(const at::Tensor& x, OptionalTensor& mask, int64_t landmarks) {
  Tokens t;
  t.length = x.size(2);
  t.landmarks = std::min(landmarks, t.length);
  if (mask) {
    mask = mask->contiguous();
    t.ignored = mask->const_data_ptr<bool>();
  }
  return t;
}

}  // namespace

Operand operand(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

Problem describe(Arguments& a) {
  Problem p;
  p.dtype = dtype_of(a.query);
  p.batch = a.query.size(0);
  p.heads = a.query.size(1);
  p.kv_heads = a.key.size(1);
  p.head_dim = a.query.size(3);
  p.value_dim = a.value.size(3);
  p.landmarks = std::min(a.num_landmarks, kMostLandmarks);
  p.iterations = a.pinv_iterations;
  p.scale = a.scale;
  p.dropout_p = a.dropout_p;
  p.global_coefficient = a.global_coefficient;
  p.window = std::min(a.window, a.key.size(2));
  p.pinned = std::min(a.pinned, a.key.size(2));
  p.query = operand(a.query);
  p.key = operand(a.key);
  p.value = operand(a.value);
  p.queries = tokens(a.query, a.query_padding_mask, p.landmarks);
  p.keys = tokens(a.key, a.key_padding_mask, p.landmarks);
  if (a.dropout_p > 0) {
    a.rng_state = a.rng_state->contiguous();
    p.rng_state = a.rng_state->const_data_ptr<int64_t>();
  }
  if (a.conv_weight) {
    const auto& w = *a.conv_weight;
    p.taps = w.size(1);
    p.conv_weight = {const_cast<void*>(w.const_data_ptr()), 0, w.stride(0), w.stride(1), 0};
  }
  return p;
}

}  // namespace nystrom_ext
