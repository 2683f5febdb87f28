// The CUDA backend: memory from torch's allocator, on the current stream, for the schedules of csrc/cuda.
//
// `Runtime` is all that ties it to a device, so that the emulator of tests/simt runs everything else as it is.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
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

  // Ranks and block numbers have 32 bits there.
  static const cuda::Schedule& schedule(const Forward& f) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    const int64_t longest = std::max(f.queries.length, f.keys.length), segments = std::max<int64_t>(f.segments(), 1);
    TORCH_CHECK(longest <= kMost, "nystrom_attention: CUDA takes sequences of at most ", kMost, " tokens, got ",
                longest);
    TORCH_CHECK(f.problems() <= kMost / segments / 2,
                "nystrom_attention: CUDA takes batch x heads x landmarks of at most ", kMost / 2, ", got ",
                f.problems() * segments, "; split the batch");
    const int shared_memory = Runtime::shared_memory();
    const cuda::Schedule& found = cuda::schedule(f, shared_memory);
    TORCH_CHECK(found.fits(f, shared_memory), "nystrom_attention: the ", shared_memory,
                " bytes of shared memory of this GPU do not hold a tile with head_dim = ", f.head_dim, " and ",
                f.value_dim, ", window = ", f.window, ", ", f.taps, " taps for ", f.heads / f.kv_heads,
                " query heads a key head; lower what is unusually large");
    return found;
  }

  static void forward(Forward& f) {
    Memory memory;
    schedule(f).forward(f, memory.device());
  }
  static void backward(Backward& g) {
    Memory memory;
    schedule(g).backward(g, memory.device());
  }
};

}  // namespace nystrom_ext
