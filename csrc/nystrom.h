// Nyström attention for C++ programs: link or dlopen libnystrom, then call this, or the op through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#define NYSTROM_API __attribute__((visibility("default")))

namespace nystrom_ext {

struct AttentionOptions {
  std::optional<at::Tensor> query_padding_mask;  // (B, L) bool, true = ignore
  std::optional<at::Tensor> conv_weight;         // (H, taps): depthwise convolution of the values, needs L = S
  int64_t num_landmarks = 64;
  int64_t pinv_iterations = 6;
  std::optional<double> scale;  // default 1 / sqrt(d)
  double dropout_p = 0.0;
  std::string coefficient = "per_head";  // or "global", the paper's released code, which couples the batch
  bool enable_gqa = false;
  int64_t window = 0;  // exact attention to the tokens at distance <= window; self-attention only
  int64_t pinned = 0;  // and to the first `pinned` tokens
};

// query (B, H, L, d), key (B, H_kv, S, d), value (B, H_kv, S, e) -> (B, H, L, e); key_padding_mask (B, S) bool,
// true = ignore. float64, float32, bfloat16, float16; any strides. Differentiable; beyond the first gradient in a
// process that has imported the Python package.
NYSTROM_API at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const std::optional<at::Tensor>& key_padding_mask = std::nullopt,
                                 const AttentionOptions& options = {});

// The same for sequences packed one after another: query (total_q, H, d), key (total_k, H_kv, d), value (total_k, H_kv,
// e)
// -> (total_q, H, e). Sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1, at most max_seqlen_q of
// them, and the keys likewise; offsets int32 or int64 (B + 1). The options' mask must be empty.
NYSTROM_API at::Tensor attention_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                        const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                        int64_t max_seqlen_q, int64_t max_seqlen_k,
                                        const AttentionOptions& options = {});

}  // namespace nystrom_ext
