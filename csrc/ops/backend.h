// What a backend provides: the four stages, forward and backward, and the plan of valid tokens they read.
#pragma once

#include <ATen/core/Tensor.h>

#include "../problem.h"

namespace nystrom_ext {

struct Backend {
  // Fills count, index and offsets of p.queries and p.keys; the returned tensor owns them.
  at::Tensor (*plan)(Problem& p);

  void (*landmarks)(const Forward&);   // Qt, Kt
  void (*key_pass)(const Forward&);    // U, LSE3
  void (*core)(const Forward&);        // W
  void (*query_pass)(const Forward&);  // O

  void (*query_pass_backward)(const Backward&);  // dW, dKt, the direct share of dQ
  void (*core_backward)(const Backward&);        // dU, delta3, dQt, dKt
  void (*key_pass_backward)(const Backward&);    // dK, dV, dconv, dQt
  void (*landmarks_backward)(const Backward&);   // the landmarks' share of dQ
};

const Backend& cpu_backend();

}  // namespace nystrom_ext
