// Under autocast query, key, value and conv_weight are cast to the autocast dtype together, as for SDPA. Everything
// m-sized stays in float32 inside the op.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace nystrom_ext {
namespace {

using AttentionOp = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                               const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, std::optional<double>,
                               double, std::string_view, bool, int64_t, int64_t);

template <c10::DispatchKey key_, c10::DeviceType device>
at::Tensor attention_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                              const OptionalTensor& conv_weight, int64_t num_landmarks, int64_t pinv_iterations,
                              std::optional<double> scale, double dropout_p, std::string_view coefficient,
                              bool enable_gqa, int64_t window, int64_t pinned) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nystrom_ext::attention", "").typed<AttentionOp>();
  const c10::impl::ExcludeDispatchKeyGuard guard(key_);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& x) { return at::autocast::cached_cast(dtype, x, device); };
  return op.call(cast(query), cast(key), cast(value), key_padding_mask, query_padding_mask, cast(conv_weight),
                 num_landmarks, pinv_iterations, scale, dropout_p, coefficient, enable_gqa, window, pinned);
}

}  // namespace

TORCH_LIBRARY_IMPL(nystrom_ext, AutocastCPU, m) {
  m.impl("attention", TORCH_FN((attention_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>)));
}
TORCH_LIBRARY_IMPL(nystrom_ext, AutocastCUDA, m) {
  m.impl("attention", TORCH_FN((attention_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>)));
}

}  // namespace nystrom_ext
