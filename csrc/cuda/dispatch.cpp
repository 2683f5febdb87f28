// Which engine takes a problem.
#include "launch.h"

#include <cstdint>

namespace nystrom_ext::cuda {
namespace {

// Rows of 16-byte chunks: what cp.async and ldmatrix read.
bool aligned(const Operand& x, int64_t columns) {
  const auto whole = [](int64_t stride) { return stride % 8 == 0; };
  return x.feature == 1 && whole(columns) && whole(x.token) && whole(x.head) && whole(x.batch) &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

const Schedule* tensor(const Problem& p) {
  static const Schedule* const bf16[] = {&tensor_bf16_32, &tensor_bf16_64, &tensor_bf16_128, &tensor_bf16_256};
  static const Schedule* const half[] = {&tensor_half_32, &tensor_half_64, &tensor_half_128, &tensor_half_256};
  const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const int i = widest <= 32 ? 0 : widest <= 64 ? 1 : widest <= 128 ? 2 : 3;
  return p.dtype == Dtype::bfloat16 ? bf16[i] : half[i];
}

const Schedule& scalar(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return scalar_double;
    case Dtype::float32:
      return scalar_float;
    case Dtype::bfloat16:
      return scalar_bf16;
    default:
      return scalar_half;
  }
}

}  // namespace

const Schedule& schedule(const Forward& f, int shared_memory) {
  const bool half = f.dtype == Dtype::bfloat16 || f.dtype == Dtype::float16;
  const bool tokens = aligned(f.query, f.head_dim) && aligned(f.key, f.head_dim) && aligned(f.value, f.value_dim) &&
                      aligned(f.out, f.value_dim);
  if (half && tokens && f.head_dim <= 256 && f.value_dim <= 256) {
    const Schedule& fast = *tensor(f);
    if (fast.fits(f, shared_memory)) return fast;
  }
  return scalar(f.dtype);
}

}  // namespace nystrom_ext::cuda
