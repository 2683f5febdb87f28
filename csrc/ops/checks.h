// Every check of the arguments. Messages name the rule, the value and the way out. Sizes are compared as SymInt, so the
// checks also hold under tracing.
#pragma once

#include "../problem.h"
#include "ops.h"

namespace nystrom_ext {

inline c10::SymInt padded(const c10::SymInt& n) { return (n + (kRowAlign - 1)) / kRowAlign * kRowAlign; }

void check(const Arguments& a);
// What the masks and the offsets hold; under tracing there is nothing to read, and a GPU is not waited for.
void check_contents(const Arguments& a);
void check_backward(const at::Tensor& grad, const Arguments& a, const Saved& saved);
// The public op's tensors, before they become one row of a batch.
void check_packed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k);
void check_no_mask(const OptionalTensor& mask);
void check_public_options(const at::Tensor& query, const at::Tensor& key, std::string_view coefficient,
                          bool enable_gqa);

}  // namespace nystrom_ext
