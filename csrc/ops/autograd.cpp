// The autograd Function over the registered forward and backward ops. Both sides call ops and never kernels, so that
// torch.compile traces through them (`is_traceable`).
#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace nystrom_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// The backward op as a Function of its own: asking for its gradient names the limit, computing one without does not.
struct AttentionBackward : Function<AttentionBackward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext*, const Variable& grad, const Variable& query, const Variable& key,
                               const Variable& value, const OptionalTensor& key_padding_mask,
                               const OptionalTensor& query_padding_mask, const OptionalTensor& conv_weight,
                               const OptionalTensor& rng_state, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, const c10::SymInt& max_seqlen_q,
                               const c10::SymInt& max_seqlen_k, const Variable& qt, const Variable& kt,
                               const Variable& u, const Variable& lse, const Variable& w, const Variable& missed,
                               int64_t num_landmarks, int64_t pinv_iterations, double scale, double dropout_p,
                               bool global_coefficient, int64_t window, int64_t pinned, GradientMask output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
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
    auto [dquery, dkey, dvalue, dconv] = call_backward(grad, a, {qt, kt, u, lse, w, missed}, output_mask);
    return {dquery, dkey, dvalue, dconv};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "nystrom_attention does not support double backward (create_graph=True); detach its "
                                "gradients, or use nystrom_ext.reference.nystrom_attention");
  }
};

OptionalTensor optional(const Variable& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

struct Attention : Function<Attention> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& query, const Variable& key, const Variable& value,
                          const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                          const OptionalTensor& conv_weight, const OptionalTensor& rng_state,
                          const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                          const c10::SymInt& max_seqlen_q, const c10::SymInt& max_seqlen_k, int64_t num_landmarks,
                          int64_t pinv_iterations, double scale, double dropout_p, bool global_coefficient,
                          int64_t window, int64_t pinned) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, qt, kt, u, lse, w, missed] =
        call_forward({query, key, value, key_padding_mask, query_padding_mask, conv_weight, rng_state, cu_seqlens_q,
                      cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_landmarks, pinv_iterations, scale, dropout_p,
                      global_coefficient, window, pinned});
    const auto defined = [](const OptionalTensor& x) { return x.value_or(Variable()); };
    ctx->save_for_backward({query, key, value, defined(key_padding_mask), defined(query_padding_mask),
                            defined(conv_weight), defined(rng_state), defined(cu_seqlens_q), defined(cu_seqlens_k), qt,
                            kt, u, lse, w, missed});
    ctx->saved_data["max_seqlen_q"] = max_seqlen_q;
    ctx->saved_data["max_seqlen_k"] = max_seqlen_k;
    ctx->saved_data["num_landmarks"] = num_landmarks;
    ctx->saved_data["pinv_iterations"] = pinv_iterations;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["global_coefficient"] = global_coefficient;
    ctx->saved_data["window"] = window;
    ctx->saved_data["pinned"] = pinned;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    auto& options = ctx->saved_data;
    const size_t conv_weight = 3 + s[3].defined() + s[4].defined();  // among the tensors that forward was given
    const GradientMask mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                               s[5].defined() && ctx->needs_input_grad(conv_weight)};
    const auto d = AttentionBackward::apply(
        grads[0], s[0], s[1], s[2], optional(s[3]), optional(s[4]), optional(s[5]), optional(s[6]), optional(s[7]),
        optional(s[8]), options["max_seqlen_q"].toSymInt(), options["max_seqlen_k"].toSymInt(), s[9], s[10], s[11],
        s[12], s[13], s[14], options["num_landmarks"].toInt(), options["pinv_iterations"].toInt(),
        options["scale"].toDouble(), options["dropout_p"].toDouble(), options["global_coefficient"].toBool(),
        options["window"].toInt(), options["pinned"].toInt(), mask);
    const auto gradient = [&](size_t i) { return mask[i] ? d[i] : Variable(); };
    const Variable none;
    return {gradient(0), gradient(1), gradient(2), none, none, gradient(3), none, none, none,
            none,        none,        none,        none, none, none,        none, none, none};
  }
};

// What Function::apply refuses next in words that name neither the operator nor a way out.
void refuse_functorch() {
  const auto& tls = at::functorch::functorchTLSAccessor();
  if (!tls) return;
  try {
    tls->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "nystrom_attention does not support torch.func's grad, vjp, jvp and what is made of "
                                "them; use .backward(), torch.autograd.grad, or "
                                "nystrom_ext.reference.nystrom_attention");
  }
}

at::Tensor differentiable(const Arguments& a) {
  refuse_functorch();
  return Attention::apply(a.query, a.key, a.value, a.key_padding_mask, a.query_padding_mask, a.conv_weight, a.rng_state,
                          a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, a.num_landmarks,
                          a.pinv_iterations, a.scale, a.dropout_p, a.global_coefficient, a.window, a.pinned);
}

at::Tensor attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                              const OptionalTensor& conv_weight, int64_t num_landmarks, int64_t pinv_iterations,
                              std::optional<double> scale, double dropout_p, std::string_view coefficient,
                              bool enable_gqa, int64_t window, int64_t pinned) {
  return differentiable(resolve(
      query, key, value, key_padding_mask, query_padding_mask,
      {conv_weight, num_landmarks, pinv_iterations, scale, dropout_p, coefficient, enable_gqa, window, pinned}));
}

at::Tensor varlen_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                           c10::SymInt max_seqlen_k, const OptionalTensor& conv_weight, int64_t num_landmarks,
                           int64_t pinv_iterations, std::optional<double> scale, double dropout_p,
                           std::string_view coefficient, bool enable_gqa, int64_t window, int64_t pinned) {
  return from_row(differentiable(resolve_packed(
      query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k),
      {conv_weight, num_landmarks, pinv_iterations, scale, dropout_p, coefficient, enable_gqa, window, pinned})));
}

}  // namespace

TORCH_LIBRARY_IMPL(nystrom_ext, Autograd, m) {
  m.impl("attention", TORCH_FN(attention_autograd));
  m.impl("attention_varlen", TORCH_FN(varlen_autograd));
  m.impl("_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_attention_backward", torch::CppFunction::makeFallthrough());
}

}  // namespace nystrom_ext
