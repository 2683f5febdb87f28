// Shapes without data: torch.compile, export and AOTInductor run these. Sizes are symbolic.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"

namespace nystrom_ext {
namespace {

// As allocate_like_heads in attention.cpp.
at::Tensor like_heads(const at::Tensor& x, const c10::SymInt& width) {
  return at::empty_symint({x.sym_size(0), x.sym_size(2), x.sym_size(1), width}, x.options()).transpose(1, 2);
}

ForwardResult forward_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                           const OptionalTensor& conv_weight, const OptionalTensor& rng_state,
                           const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                           c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, int64_t num_landmarks,
                           int64_t pinv_iterations, double scale, double dropout_p, bool global_coefficient,
                           int64_t window, int64_t pinned) {
  const Arguments a{query,
                    key,
                    value,
                    key_padding_mask,
                    query_padding_mask,
                    conv_weight,
                    rng_state,
                    cu_seqlens_q,
                    cu_seqlens_k,
                    max_seqlen_q,
                    max_seqlen_k,
                    num_landmarks,
                    pinv_iterations,
                    scale,
                    dropout_p,
                    global_coefficient,
                    window,
                    pinned};
  check(a);
  const auto options = query.options().dtype(query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto B = a.samples(), H = query.sym_size(1);
  const auto rows_q = a.longest_query().min(num_landmarks), S = a.longest_key(),
             rows_k = S.min(num_landmarks) + S.min(pinned);
  const auto d = padded(query.sym_size(3)), e = padded(value.sym_size(3));
  return {like_heads(query, value.sym_size(3)),
          at::empty_symint({B, H, rows_q, d}, options),
          at::empty_symint({B, H, rows_k, d}, options),
          at::empty_symint({B, H, rows_q, e}, options),
          at::empty_symint({B, H, rows_q}, options),
          at::empty_symint({B, H, rows_k, e}, options),
          at::empty_symint({B, H, window > 0 || pinned > 0 ? rows_q : c10::SymInt(0)}, options)};
}

BackwardResult backward_meta(const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const OptionalTensor& key_padding_mask,
                             const OptionalTensor& query_padding_mask, const OptionalTensor& conv_weight,
                             const OptionalTensor& rng_state, const OptionalTensor& cu_seqlens_q,
                             const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                             const at::Tensor& qt, const at::Tensor& kt, const at::Tensor& u, const at::Tensor& lse,
                             const at::Tensor& w, const at::Tensor& missed, int64_t num_landmarks,
                             int64_t pinv_iterations, double scale, double dropout_p, bool global_coefficient,
                             int64_t window, int64_t pinned, GradientMask output_mask) {
  check_backward(grad,
                 {query, key, value, key_padding_mask, query_padding_mask, conv_weight, rng_state, cu_seqlens_q,
                  cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_landmarks, pinv_iterations, scale, dropout_p,
                  global_coefficient, window, pinned},
                 {qt, kt, u, lse, w, missed});
  const auto gradient = [&](int i, const at::Tensor& x) {
    return output_mask[i] ? like_heads(x, x.sym_size(3)) : at::empty({0}, x.options());
  };
  const at::Tensor dconv = conv_weight && output_mask[3]
                               ? at::empty_symint({query.sym_size(1), conv_weight->sym_size(1)}, query.options())
                               : at::empty({0}, query.options());
  return {gradient(0, query), gradient(1, key), gradient(2, value), dconv};
}

}  // namespace

TORCH_LIBRARY_IMPL(nystrom_ext, Meta, m) {
  m.impl("_attention_forward", TORCH_FN(forward_meta));
  m.impl("_attention_backward", TORCH_FN(backward_meta));
}

}  // namespace nystrom_ext
