// The CUDA backend: memory from torch's allocator, on the current stream, for the schedules of csrc/cuda.
//
// `Runtime` is all that ties it to a device, so that the emulator of tests/simt runs everything else as it is.
#pragma once

#include <ATen/ops/empty.h>

#include <vector>

#include "../cuda/launch.h"
#include "backend.h"

namespace nystrom_ext {

template <class Runtime>
class CudaBackend {
 public:
  static const Backend& get() {
    static const Backend backend{arrange, forward, backward};
    return backend;
  }

 private:
  // Memory of one call. Letting go of it at the end is safe before the kernels ran: the allocator follows the stream.
  class Memory {
   public:
    cuda::Device device() {
      return {Runtime::stream(), Runtime::shared_memory(), [this](int64_t bytes) { return allocate(bytes); },
              Runtime::check};
    }

   private:
    std::vector<at::Tensor> blocks_;

    void* allocate(int64_t bytes) {
      blocks_.push_back(at::empty({bytes}, at::TensorOptions(Runtime::kDevice).dtype(at::kByte)));
      return blocks_.back().mutable_data_ptr();
    }
  };

  // The tensor-core kernels read rows of 16 bytes.
  static at::Tensor arrange(const at::Tensor& x) {
    if (x.element_size() != 2 || x.numel() == 0 || x.size(-1) % 8 != 0) return x;
    bool rows = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < x.dim() - 1; ++i) rows = rows && x.stride(i) % 8 == 0;
    return rows ? x : x.clone(at::MemoryFormat::Contiguous);
  }

  static void refuse_window(const Problem& p) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !p.extended(), "nystrom_attention: window and pinned have no CUDA kernels yet, got window = ", p.window,
        " and pinned = ", p.pinned, "; leave them out, or compute on the CPU");
  }

  static void forward(Forward& f) {
    refuse_window(f);
    Memory memory;
    cuda::schedule(f, Runtime::shared_memory()).forward(f, memory.device());
  }
  static void backward(Backward& g) {
    refuse_window(g);
    Memory memory;
    cuda::schedule(g, Runtime::shared_memory()).backward(g, memory.device());
  }
};

}  // namespace nystrom_ext
