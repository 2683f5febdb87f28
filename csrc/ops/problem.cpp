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

Tokens tokens(const at::Tensor& x, OptionalTensor& mask, OptionalTensor& offsets, int64_t longest, int64_t landmarks) {
  Tokens t;
  t.length = longest;
  t.landmarks = std::min(landmarks, t.length);
  if (offsets) {
    offsets = offsets->contiguous();
    t.first = offsets->const_data_ptr<int64_t>();
    t.total = x.size(2);
  }
  if (mask) {
    mask = mask->contiguous();
    t.ignored = mask->const_data_ptr<bool>();
  }
  return t;
}

}  // namespace

Operand operand(const at::Tensor& x) {
  const int64_t batch = x.size(0) == 1 ? 0 : x.stride(0);  // packed samples share the one row
  return {const_cast<void*>(x.const_data_ptr()), batch, x.stride(1), x.stride(2), x.stride(3)};
}

Problem describe(Arguments& a) {
  const int64_t queries = a.longest_query().expect_int(), keys = a.longest_key().expect_int();
  Problem p;
  p.dtype = dtype_of(a.query);
  p.batch = a.samples().expect_int();
  p.heads = a.query.size(1);
  p.kv_heads = a.key.size(1);
  p.head_dim = a.query.size(3);
  p.value_dim = a.value.size(3);
  p.landmarks = std::min(a.num_landmarks, kMostLandmarks);
  p.iterations = a.pinv_iterations;
  p.scale = a.scale;
  p.dropout_p = a.dropout_p;
  p.global_coefficient = a.global_coefficient;
  p.window = std::min(a.window, keys);
  p.pinned = std::min(a.pinned, keys);
  p.query = operand(a.query);
  p.key = operand(a.key);
  p.value = operand(a.value);
  p.queries = tokens(a.query, a.query_padding_mask, a.cu_seqlens_q, queries, p.landmarks);
  p.keys = tokens(a.key, a.key_padding_mask, a.cu_seqlens_k, keys, p.landmarks);
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
