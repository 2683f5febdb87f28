// The registered operators as C++ functions: each call goes through the dispatcher, so that tracing sees it.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace nystrom_ext {

using OptionalTensor = std::optional<at::Tensor>;

// The tensors and options of one call, as the internal ops carry them. Packed samples are one row of a batch, query
// (1, H, total, d), with offsets that cut it; the longest lengths mean nothing without them.
struct Arguments {
  at::Tensor query, key, value;
  OptionalTensor key_padding_mask, query_padding_mask, conv_weight, rng_state, cu_seqlens_q, cu_seqlens_k;
  c10::SymInt max_seqlen_q, max_seqlen_k;
  int64_t num_landmarks, pinv_iterations;
  double scale, dropout_p;
  bool global_coefficient;
  int64_t window, pinned;

  bool packed() const { return cu_seqlens_q.has_value(); }
  c10::SymInt samples() const { return packed() ? cu_seqlens_q->sym_size(0) - 1 : query.sym_size(0); }
  c10::SymInt longest_query() const { return packed() ? max_seqlen_q : query.sym_size(2); }
  c10::SymInt longest_key() const { return packed() ? max_seqlen_k : key.sym_size(2); }
};

// Options of the public ops, in schema order.
struct Options {
  OptionalTensor conv_weight;
  int64_t num_landmarks, pinv_iterations;
  std::optional<double> scale;
  double dropout_p;
  std::string_view coefficient;
  bool enable_gqa;
  int64_t window, pinned;
};

using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using GradientMask = std::array<bool, 4>;  // of query, key, value, conv_weight: whether its gradient is asked for
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What the forward op saves for the backward op, in schema order.
struct Saved {
  at::Tensor qt, kt, u, lse, w, missed;
};

// The signatures of `_attention_forward`, `_attention_composite` and `_attention_backward`.
template <class Result>
using OpOfArguments = Result(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                             const OptionalTensor& conv_weight, const OptionalTensor& rng_state,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                             c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, int64_t num_landmarks,
                             int64_t pinv_iterations, double scale, double dropout_p, bool global_coefficient,
                             int64_t window, int64_t pinned);
using ForwardOp = OpOfArguments<ForwardResult>;
using CompositeOp = OpOfArguments<at::Tensor>;
using BackwardOp = BackwardResult(const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
                                  const at::Tensor& value, const OptionalTensor& key_padding_mask,
                                  const OptionalTensor& query_padding_mask, const OptionalTensor& conv_weight,
                                  const OptionalTensor& rng_state, const OptionalTensor& cu_seqlens_q,
                                  const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                                  c10::SymInt max_seqlen_k, const at::Tensor& qt, const at::Tensor& kt,
                                  const at::Tensor& u, const at::Tensor& lse, const at::Tensor& w,
                                  const at::Tensor& missed, int64_t num_landmarks, int64_t pinv_iterations,
                                  double scale, double dropout_p, bool global_coefficient, int64_t window,
                                  int64_t pinned, GradientMask output_mask);

ForwardResult call_forward(const Arguments& a);
at::Tensor call_composite(const Arguments& a);
BackwardResult call_backward(const at::Tensor& grad, const Arguments& a, const Saved& saved, GradientMask output_mask);

// The public ops' arguments as the internal ops take them: defaults resolved, the dropout's seed drawn.
Arguments resolve(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask, const Options& o);
Arguments resolve_packed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                         c10::SymInt max_seqlen_k, const Options& o);

// (total, H, d) <-> (1, H, total, d)
inline at::Tensor as_row(const at::Tensor& packed) { return packed.transpose(0, 1).unsqueeze(0); }
inline at::Tensor from_row(const at::Tensor& row) { return row.squeeze(0).transpose(0, 1); }

}  // namespace nystrom_ext
