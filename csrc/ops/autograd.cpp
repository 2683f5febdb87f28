// The autograd Function over the registered forward and backward ops. Both sides call ops and never kernels, so that
// torch.compile traces through them (`is_traceable`).
#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/autograd.h>
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

// Saves a call's arguments, and more tensors, for the backward pass.
void remember(AutogradContext* ctx, const Arguments& a, const variable_list& more) {
  const auto defined = [](const OptionalTensor& x) { return x.value_or(Variable()); };
  variable_list tensors = {a.query,
                           a.key,
                           a.value,
                           defined(a.key_padding_mask),
                           defined(a.query_padding_mask),
                           defined(a.conv_weight),
                           defined(a.rng_state),
                           defined(a.cu_seqlens_q),
                           defined(a.cu_seqlens_k)};
  tensors.insert(tensors.end(), more.begin(), more.end());
  ctx->save_for_backward(std::move(tensors));
  auto& options = ctx->saved_data;
  options["max_seqlen_q"] = a.max_seqlen_q;
  options["max_seqlen_k"] = a.max_seqlen_k;
  options["num_landmarks"] = a.num_landmarks;
  options["pinv_iterations"] = a.pinv_iterations;
  options["scale"] = a.scale;
  options["dropout_p"] = a.dropout_p;
  options["global_coefficient"] = a.global_coefficient;
  options["window"] = a.window;
  options["pinned"] = a.pinned;
}

struct Remembered {
  Arguments arguments;
  variable_list more;
};

Remembered recall(AutogradContext* ctx) {
  const variable_list t = ctx->get_saved_variables();
  const auto optional = [&](size_t i) { return t[i].defined() ? OptionalTensor(t[i]) : std::nullopt; };
  auto& options = ctx->saved_data;
  return {{t[0], t[1], t[2], optional(3), optional(4), optional(5), optional(6), optional(7), optional(8),
           options["max_seqlen_q"].toSymInt(), options["max_seqlen_k"].toSymInt(), options["num_landmarks"].toInt(),
           options["pinv_iterations"].toInt(), options["scale"].toDouble(), options["dropout_p"].toDouble(),
           options["global_coefficient"].toBool(), options["window"].toInt(), options["pinned"].toInt()},
          {t.begin() + 9, t.end()}};
}

// The gradients of the composite's result, differentiable again: of query, key, value and conv_weight, those wanted.
variable_list composite_gradients(const Variable& grad, const Arguments& a, GradientMask wanted) {
  const variable_list all = {a.query, a.key, a.value, a.conv_weight.value_or(Variable())};
  variable_list inputs, results(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    if (wanted[i]) inputs.push_back(all[i]);
  }
  const auto found = torch::autograd::grad({call_composite(a)}, inputs, {grad}, /*retain_graph=*/true,
                                           /*create_graph=*/true, /*allow_unused=*/true);
  for (size_t i = 0, next = 0; i < all.size(); ++i) {
    if (wanted[i]) results[i] = found[next++];
  }
  return results;
}

// The same tensor as a variable of its own: a leaf, or, where another derivative is to follow, with its history.
Variable separate(const Variable& x, bool again) {
  return again && x.requires_grad() ? x.view_as(x) : x.detach().requires_grad_();
}

void separate(Arguments& a, bool again) {
  for (Variable* x : {&a.query, &a.key, &a.value}) *x = separate(*x, again);
  if (a.conv_weight) a.conv_weight = separate(*a.conv_weight, again);
}

// The backward op as a Function of its own: its gradient is the composite's second derivative.
struct AttentionBackward : Function<AttentionBackward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable&, const Variable&,
                               const Variable&, const OptionalTensor&, const Arguments& a, const Saved& saved,
                               GradientMask wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    remember(ctx, a, {grad});
    ctx->saved_data["wanted"] = std::vector<bool>(wanted.begin(), wanted.end());
    auto [dquery, dkey, dvalue, dconv] = call_backward(grad, a, saved, wanted);
    return {dquery, dkey, dvalue, dconv};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool again = at::GradMode::is_enabled();
    const at::AutoGradMode enable(true);
    auto [a, more] = recall(ctx);
    const Variable grad = separate(more[0], again);
    separate(a, again);
    GradientMask wanted{};
    const auto saved = ctx->saved_data["wanted"].toBoolList();
    std::copy(saved.begin(), saved.end(), wanted.begin());

    variable_list first, cotangents;
    const variable_list all = composite_gradients(grad, a, wanted);
    for (size_t i = 0; i < all.size(); ++i) {
      if (!all[i].defined() || !all[i].requires_grad() || !grads[i].defined()) continue;
      first.push_back(all[i]);
      cotangents.push_back(grads[i]);
    }
    const variable_list of = {grad, a.query, a.key, a.value, a.conv_weight.value_or(Variable())};
    variable_list inputs, results(8);
    for (size_t i = 0; i < of.size(); ++i) {
      if (of[i].defined() && ctx->needs_input_grad(i)) inputs.push_back(of[i]);
    }
    if (first.empty() || inputs.empty()) return results;
    const auto second = torch::autograd::grad(first, inputs, cotangents, /*retain_graph=*/again,
                                              /*create_graph=*/again, /*allow_unused=*/true);
    for (size_t i = 0, next = 0; i < of.size(); ++i) {
      if (of[i].defined() && ctx->needs_input_grad(i)) results[i] = second[next++];
    }
    return results;
  }
};

struct Attention : Function<Attention> {
  static constexpr bool is_traceable = true;

  // What may need a gradient is passed beside the arguments that it is part of, for Function to see.
  static Variable forward(AutogradContext* ctx, const Variable&, const Variable&, const Variable&,
                          const OptionalTensor&, const Arguments& a) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, qt, kt, u, lse, w, missed] = call_forward(a);
    remember(ctx, a, {qt, kt, u, lse, w, missed});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [a, m] = recall(ctx);
    const GradientMask wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                 a.conv_weight && ctx->needs_input_grad(3)};
    auto d = AttentionBackward::apply(grads[0], a.query, a.key, a.value, a.conv_weight, a,
                                      Saved{m[0], m[1], m[2], m[3], m[4], m[5]}, wanted);
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (!wanted[i]) d[i] = Variable();
    }
    d.resize(5);
    return d;
  }
};

// Whether a derivative is asked for that the kernels and Function have not: by torch.func, or in forward mode.
bool transformed(const Arguments& a) {
  const auto dual = [](const OptionalTensor& x) { return x && x->_fw_grad(/*level=*/0).defined(); };
  if (dual(a.query) || dual(a.key) || dual(a.value) || dual(a.conv_weight)) return true;
  const auto& tls = at::functorch::functorchTLSAccessor();
  if (!tls) return false;
  try {
    tls->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

at::Tensor differentiable(const Arguments& a) {
  if (transformed(a)) return call_composite(a);
  return Attention::apply(a.query, a.key, a.value, a.conv_weight, a);
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
