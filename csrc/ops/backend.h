// What a backend provides: its own schedule of the four stages, forward and backward.
#pragma once

#include <ATen/core/Tensor.h>

#include "../nystrom.h"
#include "../problem.h"

namespace nystrom_ext {

struct Backend {
  // An operand in a layout that the kernels read well: itself, or a copy. Null where any layout will do.
  at::Tensor (*arrange)(const at::Tensor& x);
  void (*forward)(Forward&);    // landmarks, key pass, core, query pass
  void (*backward)(Backward&);  // query pass, core, key pass, landmarks
};

// One backend per device type, kept by reference; the last one registered counts.
NYSTROM_API void register_backend(at::DeviceType device, const Backend& backend);

}  // namespace nystrom_ext
