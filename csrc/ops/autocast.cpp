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

using VarlenOp = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const at::Tensor&, c10::SymInt, c10::SymInt, const OptionalTensor&, int64_t, int64_t,
                            std::optional<double>, double, std::string_view, bool, int64_t, int64_t);

// Casts tensors to the autocast dtype, below autocast.
template <c10::DispatchKey key, c10::DeviceType device>
struct Cast {
  const c10::impl::ExcludeDispatchKeyGuard guard{key};
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);

  template <class X>
  X operator()(const X& x) const {
    return at::autocast::cached_cast(dtype, x, device);
  }
};

template <c10::DispatchKey key_, c10::DeviceType device>
at::Tensor attention_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                              const OptionalTensor& conv_weight, int64_t num_landmarks, int64_t pinv_iterations,
                              std::optional<double> scale, double dropout_p, std::string_view coefficient,
                              bool enable_gqa, int64_t window, int64_t pinned) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nystrom_ext::attention", "").typed<AttentionOp>();
  const Cast<key_, device> cast;
  return op.call(cast(query), cast(key), cast(value), key_padding_mask, query_padding_mask, cast(conv_weight),
                 num_landmarks, pinv_iterations, scale, dropout_p, coefficient, enable_gqa, window, pinned);
}

template <c10::DispatchKey key_, c10::DeviceType device>
at::Tensor varlen_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                           c10::SymInt max_seqlen_k, const OptionalTensor& conv_weight, int64_t num_landmarks,
                           int64_t pinv_iterations, std::optional<double> scale, double dropout_p,
                           std::string_view coefficient, bool enable_gqa, int64_t window, int64_t pinned) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nystrom_ext::attention_varlen", "").typed<VarlenOp>();
  const Cast<key_, device> cast;
  return op.call(cast(query), cast(key), cast(value), cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q),
                 std::move(max_seqlen_k), cast(conv_weight), num_landmarks, pinv_iterations, scale, dropout_p,
                 coefficient, enable_gqa, window, pinned);
}

template <c10::DispatchKey key, c10::DeviceType device>
void implement(torch::Library& m) {
  m.impl("attention", TORCH_FN((attention_autocast<key, device>)));
  m.impl("attention_varlen", TORCH_FN((varlen_autocast<key, device>)));
}

}  // namespace

TORCH_LIBRARY_IMPL(nystrom_ext, AutocastCPU, m) { implement<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(nystrom_ext, AutocastCUDA, m) {
  implement<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>(m);
}

}  // namespace nystrom_ext
