// The operators below autograd: allocate, and let the device's backend run its schedule of the stages.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "../nystrom.h"
#include "backend.h"
#include "checks.h"
#include "problem.h"

namespace nystrom_ext {
namespace {

// Rows that no kernel writes (padding, landmarks that a short sample lacks) must read as zero.
at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options, bool zero) {
  return zero ? at::zeros(sizes, options) : at::empty(sizes, options);
}

// Memory fresh from the system, as glibc's blocks of 32 MiB and more always are and smaller ones may be, is touched
// here first: up to a third of a call in pages of 4 KiB, far less in huge ones. Where the system refuses, pages stay
// small.
void advise_huge_pages([[maybe_unused]] const at::Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kWorthwhile = size_t(1) << 22;  // two huge pages: one of them whole
  if (!x.is_cpu() || x.nbytes() < kWorthwhile) return;
  const auto page = int64_t(::sysconf(_SC_PAGESIZE)), address = reinterpret_cast<int64_t>(x.data_ptr());
  const int64_t begin = round_up(address, page), end = (address + int64_t(x.nbytes())) / page * page;
  ::madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);
#endif
}

// (B, H, n, width) in the memory order (B, n, H, width), so that joining the heads is a view.
at::Tensor allocate_like_heads(const at::Tensor& x, int64_t width, bool zero) {
  const at::Tensor memory = at::empty({x.size(0), x.size(2), x.size(1), width}, x.options());
  advise_huge_pages(memory);
  if (zero) memory.zero_();
  return memory.transpose(1, 2);
}

at::TensorOptions accumulation(const at::Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

std::array<const Backend*, size_t(at::COMPILE_TIME_MAX_DEVICE_TYPES)>& backends() {
  static std::array<const Backend*, size_t(at::COMPILE_TIME_MAX_DEVICE_TYPES)> table{};
  return table;
}

const Backend& backend_of(const at::Tensor& x) {
  const Backend* backend = backends()[size_t(x.device().type())];
  TORCH_CHECK(backend, "nystrom_attention: this build has no kernels for ", x.device(),
              "; reinstall it beside a CUDA build of torch with nvcc on the PATH");
  return *backend;
}

at::Tensor arranged(const Backend& backend, const at::Tensor& x) { return backend.arrange ? backend.arrange(x) : x; }

void arrange(const Backend& backend, Arguments& a) {
  for (at::Tensor* x : {&a.query, &a.key, &a.value}) *x = arranged(backend, *x);
}

void set(Forward& f, const at::Tensor& out, const Saved& saved) {
  f.out = operand(out);
  f.qt = saved.qt.data_ptr();
  f.kt = saved.kt.data_ptr();
  f.u = saved.u.data_ptr();
  f.lse = saved.lse.data_ptr();
  f.w = saved.w.data_ptr();
  f.missed = saved.missed.data_ptr();
}

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                      const OptionalTensor& conv_weight, const OptionalTensor& rng_state,
                      const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                      c10::SymInt max_seqlen_k, int64_t num_landmarks, int64_t pinv_iterations, double scale,
                      double dropout_p, bool global_coefficient, int64_t window, int64_t pinned) {
  Arguments a{query,
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
  check_contents(a);
  const Backend& backend = backend_of(query);
  const c10::DeviceGuard guard(query.device());
  arrange(backend, a);
  Forward f{describe(a)};

  const bool uneven = key_padding_mask || query_padding_mask || a.packed() ||
                      std::min(f.queries.length, f.keys.length) <= std::max(f.landmarks, f.pinned);
  const auto options = accumulation(query);
  const int64_t rows = f.queries.landmarks, columns = f.columns(), d = f.head_width(), e = f.value_width();
  const auto matrix = [&](int64_t n, int64_t width) { return allocate({f.batch, f.heads, n, width}, options, uneven); };
  const auto vector = [&](int64_t n) { return allocate({f.batch, f.heads, n}, options, uneven); };
  const Saved saved{matrix(rows, d), matrix(columns, d), matrix(rows, e),
                    vector(rows),    matrix(columns, e), vector(f.extended() ? rows : 0)};
  const at::Tensor out = allocate_like_heads(query, f.value_dim, query_padding_mask.has_value());
  set(f, out, saved);
  backend.forward(f);
  return {out, saved.qt, saved.kt, saved.u, saved.lse, saved.w, saved.missed};
}

BackwardResult backward(const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                        const OptionalTensor& conv_weight, const OptionalTensor& rng_state,
                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                        c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, const at::Tensor& qt, const at::Tensor& kt,
                        const at::Tensor& u, const at::Tensor& lse, const at::Tensor& w, const at::Tensor& missed,
                        int64_t num_landmarks, int64_t pinv_iterations, double scale, double dropout_p,
                        bool global_coefficient, int64_t window, int64_t pinned, GradientMask output_mask) {
  Arguments a{query,
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
  const Saved saved{qt, kt, u, lse, w, missed};
  check_backward(grad, a, saved);
  if (query.is_cpu()) check_contents(a);  // elsewhere the forward pass has asked
  const Backend& backend = backend_of(query);
  const c10::DeviceGuard guard(query.device());
  arrange(backend, a);
  Backward g{Forward{describe(a)}};
  const at::Tensor dout = arranged(backend, grad);
  set(g, dout, saved);

  const Wanted& wanted = g.wanted = {output_mask[0], output_mask[1], output_mask[2], output_mask[3] && g.taps > 0};
  const auto options = accumulation(query);
  const at::Tensor none = at::empty({0}, options);
  const auto like = [&](const at::Tensor& x, bool needed) { return needed ? at::empty_like(x) : none; };
  const auto like_heads = [&](const at::Tensor& x, int64_t width, bool zero, bool needed) {
    return needed ? allocate_like_heads(x, width, zero) : at::empty({0}, x.options());
  };
  const at::Tensor dquery = like_heads(query, g.head_dim, query_padding_mask.has_value(), wanted.query);
  const at::Tensor dkey = like_heads(key, g.head_dim, key_padding_mask.has_value(), wanted.key);
  const at::Tensor dvalue = like_heads(value, g.value_dim, key_padding_mask.has_value(), wanted.value);
  const at::Tensor dconv = wanted.conv ? at::zeros({g.heads, g.taps}, options) : none;
  const at::Tensor dqt = like(qt, wanted.query), dkt = like(kt, wanted.key);
  const at::Tensor du = like(u, wanted.attention()), dw = like(w, wanted.attention());
  const at::Tensor delta = like(lse, wanted.scores()), dmissed = like(missed, wanted.scores());
  if (wanted.query) g.dquery = operand(dquery);
  if (wanted.key) g.dkey = operand(dkey);
  if (wanted.value) g.dvalue = operand(dvalue);
  g.dconv = dconv.data_ptr();
  g.dqt = dqt.data_ptr();
  g.dkt = dkt.data_ptr();
  g.du = du.data_ptr();
  g.dw = dw.data_ptr();
  g.delta = delta.data_ptr();
  g.dmissed = dmissed.data_ptr();
  if (wanted.attention() || wanted.conv) backend.backward(g);
  return {dquery, dkey, dvalue, dconv.to(query.scalar_type())};
}

// The public ops below autograd: no gradient is needed, or none can be.
at::Tensor attention_without_grad(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask,
                                  const OptionalTensor& conv_weight, int64_t num_landmarks, int64_t pinv_iterations,
                                  std::optional<double> scale, double dropout_p, std::string_view coefficient,
                                  bool enable_gqa, int64_t window, int64_t pinned) {
  return std::get<0>(call_forward(resolve(
      query, key, value, key_padding_mask, query_padding_mask,
      {conv_weight, num_landmarks, pinv_iterations, scale, dropout_p, coefficient, enable_gqa, window, pinned})));
}

at::Tensor varlen_without_grad(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                               c10::SymInt max_seqlen_k, const OptionalTensor& conv_weight, int64_t num_landmarks,
                               int64_t pinv_iterations, std::optional<double> scale, double dropout_p,
                               std::string_view coefficient, bool enable_gqa, int64_t window, int64_t pinned) {
  return from_row(std::get<0>(call_forward(resolve_packed(
      query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k),
      {conv_weight, num_landmarks, pinv_iterations, scale, dropout_p, coefficient, enable_gqa, window, pinned}))));
}

// Defaults and the seed; `a` has its tensors.
Arguments complete(Arguments a, const Options& o) {
  check_public_options(a.query, a.key, o.coefficient, o.enable_gqa);
  a.conv_weight = o.conv_weight;
  a.num_landmarks = o.num_landmarks;
  a.pinv_iterations = o.pinv_iterations;
  a.scale = o.scale.value_or(1.0);
  a.dropout_p = o.dropout_p;
  a.global_coefficient = o.coefficient == "global";
  a.window = o.window;
  a.pinned = o.pinned;
  // The seed is drawn as a tensor by an op of torch's own: manual_seed, tracing, checkpointing and CUDA graphs all know
  // it.
  if (a.dropout_p > 0) {
    a.rng_state = at::randint(std::numeric_limits<int64_t>::max(), {2}, a.query.options().dtype(at::kLong));
  }
  check(a);
  if (!o.scale) a.scale = 1 / std::sqrt(double(a.query.sym_size(3).guard_int(__FILE__, __LINE__)));
  return a;
}

// As torch's own functions take it: an undefined tensor is none.
OptionalTensor given(const OptionalTensor& x) { return x && x->defined() ? x : std::nullopt; }

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class Op>
auto call(const Op& op, const Arguments& a) {
  return op.call(a.query, a.key, a.value, a.key_padding_mask, a.query_padding_mask, a.conv_weight, a.rng_state,
                 a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, a.num_landmarks, a.pinv_iterations,
                 a.scale, a.dropout_p, a.global_coefficient, a.window, a.pinned);
}

}  // namespace

void register_backend(at::DeviceType device, const Backend& backend) { backends()[size_t(device)] = &backend; }

Arguments resolve(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const OptionalTensor& key_padding_mask, const OptionalTensor& query_padding_mask, const Options& o) {
  return complete({query, key, value, key_padding_mask, query_padding_mask}, o);
}

Arguments resolve_packed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                         c10::SymInt max_seqlen_k, const Options& o) {
  check_packed(query, key, value, cu_seqlens_q, cu_seqlens_k);
  Arguments a{as_row(query), as_row(key), as_row(value)};
  a.cu_seqlens_q = cu_seqlens_q.to(at::kLong);
  a.cu_seqlens_k = cu_seqlens_k.is_same(cu_seqlens_q) ? a.cu_seqlens_q : cu_seqlens_k.to(at::kLong);
  a.max_seqlen_q = std::move(max_seqlen_q);
  a.max_seqlen_k = std::move(max_seqlen_k);
  return complete(std::move(a), o);
}

ForwardResult call_forward(const Arguments& a) {
  static const auto op = find<ForwardOp>("nystrom_ext::_attention_forward");
  return call(op, a);
}

at::Tensor call_composite(const Arguments& a) {
  static const auto op = find<CompositeOp>("nystrom_ext::_attention_composite");
  TORCH_CHECK_NOT_IMPLEMENTED(op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd),
                              "nystrom_attention: derivatives of gradients, forward-mode derivatives and torch.func "
                              "need the Python package; import nystrom_ext in this process");
  return call(op, a);
}

BackwardResult call_backward(const at::Tensor& grad, const Arguments& a, const Saved& s, GradientMask output_mask) {
  static const auto op = find<BackwardOp>("nystrom_ext::_attention_backward");
  return op.call(grad, a.query, a.key, a.value, a.key_padding_mask, a.query_padding_mask, a.conv_weight, a.rng_state,
                 a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, s.qt, s.kt, s.u, s.lse, s.w, s.missed,
                 a.num_landmarks, a.pinv_iterations, a.scale, a.dropout_p, a.global_coefficient, a.window, a.pinned,
                 output_mask);
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& key_padding_mask, const AttentionOptions& o) {
  static const auto op = find<decltype(attention_without_grad)>("nystrom_ext::attention");
  return op.call(query, key, value, given(key_padding_mask), given(o.query_padding_mask), given(o.conv_weight),
                 o.num_landmarks, o.pinv_iterations, o.scale, o.dropout_p, o.coefficient, o.enable_gqa, o.window,
                 o.pinned);
}

at::Tensor attention_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                            int64_t max_seqlen_k, const AttentionOptions& o) {
  static const auto op = find<decltype(varlen_without_grad)>("nystrom_ext::attention_varlen");
  check_no_mask(given(o.query_padding_mask));
  return op.call(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given(o.conv_weight),
                 o.num_landmarks, o.pinv_iterations, o.scale, o.dropout_p, o.coefficient, o.enable_gqa, o.window,
                 o.pinned);
}

TORCH_LIBRARY_IMPL(nystrom_ext, CompositeExplicitAutograd, m) {
  m.impl("attention", TORCH_FN(attention_without_grad));
  m.impl("attention_varlen", TORCH_FN(varlen_without_grad));
}

void implement(torch::Library& m) {
  m.impl("_attention_forward", TORCH_FN(forward));
  m.impl("_attention_backward", TORCH_FN(backward));
}
TORCH_LIBRARY_IMPL(nystrom_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(nystrom_ext, CUDA, m) { implement(m); }

}  // namespace nystrom_ext
