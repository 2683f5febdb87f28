// What the torch-facing side calls: forward and backward as sequences of launches, one instance per engine.
#pragma once

#include <functional>

#include "../problem.h"

namespace nystrom_ext::cuda {

// Where to launch. Memory from `allocate` lives until the caller lets it go, in the stream's order.
struct Device {
  void* stream;
  int shared_memory;  // bytes that one block may have
  std::function<void*(int64_t bytes)> allocate;
  std::function<void()> launched;  // after each launch: checks for errors
};

struct Schedule {
  bool (*fits)(const Problem&, int shared_memory);
  void (*forward)(Forward, const Device&);
  void (*backward)(Backward, const Device&);
};

extern const Schedule tensor_bf16_32, tensor_bf16_64, tensor_bf16_128, tensor_bf16_256;
extern const Schedule tensor_half_32, tensor_half_64, tensor_half_128, tensor_half_256;
extern const Schedule scalar_double, scalar_float, scalar_bf16, scalar_half;

// The fastest schedule that takes the problem.
const Schedule& schedule(const Forward& f, int shared_memory);

}  // namespace nystrom_ext::cuda
