// Tensors -> Problem: plain sizes, strides and pointers.
#pragma once

#include "../problem.h"
#include "ops.h"

namespace nystrom_ext {

Operand operand(const at::Tensor& x);  // (batch, head, token, feature)

// `a` must pass check(); its masks, offsets and rng_state are made contiguous, and must outlive the problem.
Problem describe(Arguments& a);

}  // namespace nystrom_ext
