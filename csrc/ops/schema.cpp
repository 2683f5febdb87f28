// Every operator on one screen. Kernels: autograd.cpp, autocast.cpp, attention.cpp (CPU and CUDA), meta.cpp.
#include <torch/library.h>

TORCH_LIBRARY(nystrom_ext, m) {
  // query (B, H, L, d), key (B, H_kv, S, d), value (B, H_kv, S, e) -> (B, H, L, e). Masks bool, true = ignore:
  // (B, S) and (B, L). conv_weight (H, taps). scale: default 1 / sqrt(d). coefficient: "per_head" or "global". window,
  // pinned: exact attention to the tokens at distance <= window and to the first `pinned` ones.
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask=None, *, "
      "Tensor? query_padding_mask=None, Tensor? conv_weight=None, int num_landmarks=64, int pinv_iterations=6, "
      "float? scale=None, float dropout_p=0.0, str coefficient=\"per_head\", bool enable_gqa=False, "
      "int window=0, int pinned=0) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});

  // Sequences packed one after another: query (total_q, H, d), key (total_k, H_kv, d), value (total_k, H_kv, e) ->
  // (total_q, H, e). Sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1, at most max_seqlen_q, and
  // the keys likewise; offsets int32 or int64 (B + 1).
  m.def(
      "attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, *, Tensor? conv_weight=None, int num_landmarks=64, "
      "int pinv_iterations=6, float? scale=None, float dropout_p=0.0, str coefficient=\"per_head\", "
      "bool enable_gqa=False, int window=0, int pinned=0) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});

  // The two in one, without randomness of their own: rng_state int64 (2), seed and offset, where dropout_p > 0; with
  // offsets, int64, query (1, H, total_q, d) and so on hold B packed samples, and L, S are the longest. Also returns
  // what the backward pass needs, in float64 for float64 inputs and float32 otherwise, rows padded with zeros to a
  // multiple of 16: Qt (B, H, min(m, L), d), Kt (B, H, r, d), U (B, H, min(m, L), e), LSE3 (B, H, min(m, L)),
  // W (B, H, r, e) with r = min(m, S) + min(pinned, S), and the missed mass (B, H, min(m, L)), of no elements without
  // window and pinned.
  m.def(
      "_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? "
      "query_padding_mask, "
      "Tensor? conv_weight, Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, int num_landmarks, int pinv_iterations, float scale, float dropout_p, "
      "bool global_coefficient, int window, int pinned) -> (Tensor out, Tensor qt, Tensor kt, Tensor u, Tensor lse, "
      "Tensor w, Tensor missed)",
      {at::Tag::pt2_compliant_tag});

  // Gradients of query, key, value and conv_weight from grad = dL/d out. Those that output_mask does not ask for, and
  // that of no conv_weight, have no elements and cost nothing; the bits of the others do not depend on it.
  m.def(
      "_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, "
      "Tensor? query_padding_mask, Tensor? conv_weight, Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor qt, Tensor kt, Tensor u, Tensor lse, Tensor w, Tensor missed, "
      "int num_landmarks, int pinv_iterations, float scale, float dropout_p, "
      "bool global_coefficient, int window, int pinned, bool[4] output_mask) -> "
      "(Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dconv_weight)",
      {at::Tag::pt2_compliant_tag});

  // `_attention_forward`'s out in differentiable ATen operations, for derivatives that the kernels have not.
  // Implemented in Python, nystrom_ext/_transforms.py.
  m.def(
      "_attention_composite(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? "
      "query_padding_mask, Tensor? conv_weight, Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, int num_landmarks, int pinv_iterations, float scale, "
      "float dropout_p, bool global_coefficient, int window, int pinned) -> Tensor",
      {at::Tag::pt2_compliant_tag});

  // The instruction set of the CPU kernels in use: default, avx2 or avx512.
  m.def("_cpu_capability() -> str");
}
