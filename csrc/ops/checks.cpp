#include "checks.h"

#include <ATen/ops/_assert_async.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/logical_and.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <string>
#include <vector>

namespace nystrom_ext {
namespace {

#define NYSTROM_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, "nystrom_attention: ", __VA_ARGS__)

void check_mask(const OptionalTensor& mask, const char* name, const char* shape, const at::Tensor& tokens) {
  if (!mask) return;
  NYSTROM_CHECK(mask->scalar_type() == at::kBool, name, " must be bool with True = ignore, got ", mask->scalar_type(),
                "; write mask.bool(), or `mask == 0` for a mask of ones at the tokens to keep");
  NYSTROM_CHECK(mask->dim() == 2 && mask->sym_size(0) == tokens.sym_size(0) && mask->sym_size(1) == tokens.sym_size(2),
                name, " must have shape ", shape, " = (", tokens.sym_size(0), ", ", tokens.sym_size(2), "), got ",
                mask->sym_sizes());
  NYSTROM_CHECK(mask->device() == tokens.device(), name, " must be on the device of query, ", tokens.device(), ", got ",
                mask->device(), "; move it there with .to()");
}

void check_tensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  const std::pair<const char*, const at::Tensor*> all[] = {{"query", &query}, {"key", &key}, {"value", &value}};
  for (const auto& [name, x] : all) {
    NYSTROM_CHECK(x->dim() == 4, name, " must have 4 dimensions (batch, heads, tokens, features), got shape ",
                  x->sym_sizes(), "; add the missing ones with unsqueeze");
    NYSTROM_CHECK(x->scalar_type() == query.scalar_type(), "query, key and value must have one dtype, got ",
                  query.scalar_type(), ", ", key.scalar_type(), ", ", value.scalar_type(), "; cast them with .to()");
    NYSTROM_CHECK(x->device() == query.device(), "query, key and value must be on one device, got ", query.device(),
                  ", ", key.device(), ", ", value.device(), "; move them with .to()");
  }
  const auto dtype = query.scalar_type();
  NYSTROM_CHECK(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                "dtype must be float64, float32, bfloat16 or float16, got ", dtype, "; cast with .float()");
}

// Symbolic sizes that cannot be compared yet are compared when there are numbers.
void check_offsets(const Arguments& a) {
  NYSTROM_CHECK(a.cu_seqlens_q.has_value() == a.cu_seqlens_k.has_value(),
                "packed samples need cu_seqlens_q and cu_seqlens_k, got only one; pass the other too");
  if (!a.packed()) return;
  check_no_mask(a.key_padding_mask ? a.key_padding_mask : a.query_padding_mask);
  for (const auto& [name, x] : {std::pair("cu_seqlens_q", &*a.cu_seqlens_q), {"cu_seqlens_k", &*a.cu_seqlens_k}}) {
    NYSTROM_CHECK(x->scalar_type() == at::kLong && x->dim() == 1 && x->device() == a.query.device(), name,
                  " must be an int64 tensor (B + 1) on the device of query, ", a.query.device(), ", got ",
                  x->sym_sizes(), ", ", x->scalar_type(), " on ", x->device());
  }
  NYSTROM_CHECK(a.query.sym_size(0) == 1 && a.cu_seqlens_q->sym_size(0) >= 2,
                "packed samples are one row with at least two offsets, got query of ", a.query.sym_sizes(), " and ",
                a.cu_seqlens_q->sym_size(0), " offsets");
  NYSTROM_CHECK(a.cu_seqlens_q->sym_size(0) == a.cu_seqlens_k->sym_size(0),
                "cu_seqlens_q and cu_seqlens_k must hold the offsets of as many sequences, got ", a.samples(), " and ",
                a.cu_seqlens_k->sym_size(0) - 1);
}

void check_window(const Arguments& a) {
  NYSTROM_CHECK(a.window >= 0, "window must not be negative, got ", a.window, "; 0 is no window");
  NYSTROM_CHECK(a.pinned >= 0, "pinned must not be negative, got ", a.pinned, "; 0 pins no tokens");
  if (a.window == 0 && a.pinned == 0) return;
  NYSTROM_CHECK(a.query.sym_size(2) == a.key.sym_size(2),
                "window and pinned need self-attention, got window = ", a.window, " and pinned = ", a.pinned,
                " with L = ", a.query.sym_size(2), " and S = ", a.key.sym_size(2),
                "; leave them out for cross-attention");
  NYSTROM_CHECK(a.key_padding_mask.has_value() == a.query_padding_mask.has_value(),
                "window and pinned need the same mask for queries and keys, got only ",
                a.key_padding_mask ? "key_padding_mask" : "query_padding_mask", "; pass it as ",
                a.key_padding_mask ? "query_padding_mask" : "key_padding_mask", " too");
}

// Two tensors that must hold the same.
void check_equal(const at::Tensor& a, const at::Tensor& b, const char* message) {
  if (a.is_same(b) || (a.data_ptr() == b.data_ptr() && a.sizes() == b.sizes() && a.strides() == b.strides())) return;
  if (a.device().is_cpu()) {
    TORCH_CHECK_VALUE(at::equal(a, b), message);
  } else {
    at::_assert_async(at::eq(a, b).all(), message);
  }
}

void check_lengths(const at::Tensor& offsets, const char* side, int64_t total, int64_t longest) {
  const std::string rule = c10::str(
      "cu_seqlens_", side, " must rise from 0 to the number of tokens, by at most max_seqlen_", side, " at a time");
  if (!offsets.device().is_cpu()) {
    const at::Tensor lengths = offsets.diff(), ends = offsets[0].eq(0).logical_and(offsets[-1].eq(total));
    at::_assert_async(lengths.eq(lengths.clamp(0, longest)).all().logical_and(ends), "nystrom_attention: " + rule);
    return;
  }
  const at::Tensor contiguous = offsets.contiguous();
  const int64_t* x = contiguous.const_data_ptr<int64_t>();
  const int64_t last = offsets.size(0) - 1;
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t before = i ? x[i - 1] : 0, most = i ? longest : 0;
    const bool fits = x[i] >= before && x[i] <= total && x[i] - before <= most && (i < last || x[i] == total);
    NYSTROM_CHECK(fits, rule, ", got ", x[i], " at place ", i, " of ", last, " after ", before, " for ", total,
                  " tokens and max_seqlen_", side, " = ", longest, "; lengths.cumsum(0) with a 0 in front fits");
  }
}

}  // namespace

void check(const Arguments& a) {
  const auto &query = a.query, &key = a.key, &value = a.value;
  check_tensors(query, key, value);
  NYSTROM_CHECK(query.sym_size(0) == key.sym_size(0) && key.sym_size(0) == value.sym_size(0),
                "query, key and value must have one batch size, got ", query.sym_size(0), ", ", key.sym_size(0), ", ",
                value.sym_size(0), "; expand() the smaller ones");
  NYSTROM_CHECK(key.sym_size(1) == value.sym_size(1), "key and value must have the same number of heads, got ",
                key.sym_size(1), " and ", value.sym_size(1));
  NYSTROM_CHECK(key.sym_size(1) > 0 && query.sym_size(1) > 0 && query.sym_size(1) % key.sym_size(1) == 0,
                "the heads of query must be a positive multiple of the heads of key, got ", query.sym_size(1), " and ",
                key.sym_size(1));
  NYSTROM_CHECK(key.sym_size(2) == value.sym_size(2), "key and value must have the same number of tokens, got ",
                key.sym_size(2), " and ", value.sym_size(2));
  NYSTROM_CHECK(query.sym_size(3) == key.sym_size(3), "query and key must have the same head_dim, got ",
                query.sym_size(3), " and ", key.sym_size(3));
  NYSTROM_CHECK(query.sym_size(3) > 0 && value.sym_size(3) > 0, "head_dim must be at least 1, got ", query.sym_size(3),
                " for query and ", value.sym_size(3), " for value");
  check_offsets(a);
  check_mask(a.key_padding_mask, "key_padding_mask", "(batch, key tokens)", key);
  check_mask(a.query_padding_mask, "query_padding_mask", "(batch, query tokens)", query);
  check_window(a);

  NYSTROM_CHECK(a.num_landmarks >= 1, "num_landmarks must be at least 1, got ", a.num_landmarks,
                "; 64 is a good start");
  NYSTROM_CHECK(a.pinv_iterations >= 0, "pinv_iterations must not be negative, got ", a.pinv_iterations,
                "; the paper uses 6");
  NYSTROM_CHECK(std::isfinite(a.scale), "scale must be finite, got ", a.scale, "; None means 1 / sqrt(head_dim)");
  NYSTROM_CHECK(a.dropout_p >= 0 && a.dropout_p <= 1, "dropout_p must be between 0 and 1, got ", a.dropout_p);
  if (a.dropout_p > 0) {
    NYSTROM_CHECK(a.rng_state && a.rng_state->scalar_type() == at::kLong && a.rng_state->dim() == 1 &&
                      a.rng_state->sym_size(0) == 2 && a.rng_state->device() == query.device(),
                  "dropout_p > 0 needs rng_state, an int64 tensor (seed, offset) on the device of query");
  }
  if (a.conv_weight) {
    const auto& w = *a.conv_weight;
    NYSTROM_CHECK(w.dim() == 2 && w.sym_size(0) == query.sym_size(1) && w.sym_size(1) > 0,
                  "conv_weight must have shape (heads, taps) with heads = ", query.sym_size(1), ", got ",
                  w.sym_sizes());
    NYSTROM_CHECK(w.scalar_type() == query.scalar_type() && w.device() == query.device(),
                  "conv_weight must have the dtype and device of query, ", query.scalar_type(), " on ", query.device(),
                  ", got ", w.scalar_type(), " on ", w.device(), "; cast it with .to(query)");
    NYSTROM_CHECK(query.sym_size(2) == key.sym_size(2),
                  "conv_weight needs as many queries as keys, got L = ", query.sym_size(2),
                  " and S = ", key.sym_size(2), "; leave conv_weight out for cross-attention");
  }
}

void check_contents(const Arguments& a) {
  const bool exact_columns = a.window > 0 || a.pinned > 0;
  if (exact_columns && a.key_padding_mask) {
    check_equal(*a.key_padding_mask, *a.query_padding_mask,
                "nystrom_attention: window and pinned need the same mask for queries and keys, got two that differ; "
                "pass one mask twice, or leave window and pinned out");
  }
  if (!a.packed()) return;
  const bool same = a.cu_seqlens_q->is_same(*a.cu_seqlens_k) && a.query.size(2) == a.key.size(2) &&
                    a.max_seqlen_q.expect_int() == a.max_seqlen_k.expect_int();
  check_lengths(*a.cu_seqlens_q, "q", a.query.size(2), a.max_seqlen_q.expect_int());
  if (!same) check_lengths(*a.cu_seqlens_k, "k", a.key.size(2), a.max_seqlen_k.expect_int());
  if (exact_columns || a.conv_weight) {
    check_equal(*a.cu_seqlens_q, *a.cu_seqlens_k,
                "nystrom_attention: conv_weight, window and pinned need self-attention, got cu_seqlens_q and "
                "cu_seqlens_k that differ; pass one tensor twice, or leave these options out for cross-attention");
  }
}

void check_packed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k) {
  const std::pair<const char*, const at::Tensor*> all[] = {{"query", &query}, {"key", &key}, {"value", &value}};
  for (const auto& [name, x] : all) {
    NYSTROM_CHECK(x->dim() == 3, name, " must have shape (tokens, heads, features), got ", x->sym_sizes(),
                  "; use .flatten(0, 1)");
  }
  for (const auto& [name, x] : {std::pair("cu_seqlens_q", &cu_seqlens_q), {"cu_seqlens_k", &cu_seqlens_k}}) {
    const bool integers = x->scalar_type() == at::kInt || x->scalar_type() == at::kLong;
    NYSTROM_CHECK(integers && x->dim() == 1 && x->sym_size(0) >= 2, name,
                  " must have shape (sequences + 1) and dtype int32 or int64, got ", x->sym_sizes(), " of ",
                  x->scalar_type(), "; lengths.cumsum(0) with a 0 in front is it");
    NYSTROM_CHECK(x->device() == query.device(), name, " must be on the device of query, ", query.device(), ", got ",
                  x->device(), "; move it there with .to()");
  }
}

void check_no_mask(const OptionalTensor& mask) {
  NYSTROM_CHECK(!mask, "packed sequences have no padding, got a mask; leave it out");
}

void check_backward(const at::Tensor& grad, const Arguments& a, const Saved& saved) {
  check(a);
  const auto &q = a.query, &v = a.value;
  NYSTROM_CHECK(grad.dim() == 4 && grad.sym_size(0) == q.sym_size(0) && grad.sym_size(1) == q.sym_size(1) &&
                    grad.sym_size(2) == q.sym_size(2) && grad.sym_size(3) == v.sym_size(3) &&
                    grad.scalar_type() == q.scalar_type() && grad.device() == q.device(),
                "the gradient must have the shape, dtype and device of the output, got ", grad.sym_sizes(), ", ",
                grad.scalar_type(), " on ", grad.device());
  const auto L = a.longest_query(), S = a.longest_key(), rows = L.min(a.num_landmarks),
             columns = S.min(a.num_landmarks) + S.min(a.pinned),
             missed = a.window > 0 || a.pinned > 0 ? rows : c10::SymInt(0);
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto B = a.samples(), H = q.sym_size(1), d = padded(q.sym_size(3)), e = padded(v.sym_size(3));
  const auto fits = [&](const at::Tensor& x, const std::vector<c10::SymInt>& shape) {
    return x.sym_sizes() == c10::SymIntArrayRef(shape) && x.is_contiguous() && x.scalar_type() == type &&
           x.device() == q.device();
  };
  NYSTROM_CHECK(fits(saved.qt, {B, H, rows, d}) && fits(saved.kt, {B, H, columns, d}) &&
                    fits(saved.u, {B, H, rows, e}) && fits(saved.w, {B, H, columns, e}) &&
                    fits(saved.lse, {B, H, rows}) && fits(saved.missed, {B, H, missed}),
                "the saved tensors are not those that _attention_forward returned for these arguments");
}

void check_public_options(const at::Tensor& query, const at::Tensor& key, std::string_view coefficient,
                          bool enable_gqa) {
  NYSTROM_CHECK(coefficient == "per_head" || coefficient == "global",
                "coefficient must be \"per_head\" or \"global\", got \"", coefficient, "\"");
  if (query.dim() != 4 || key.dim() != 4) return;  // said better by check()
  NYSTROM_CHECK(enable_gqa || query.sym_size(1) == key.sym_size(1),
                "query and key must have the same number of heads, got ", query.sym_size(1), " and ", key.sym_size(1),
                "; pass enable_gqa=True for grouped-query attention");
}

}  // namespace nystrom_ext
