// The CUDA backend on the current device. Compiled only beside a CUDA build of torch.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda_backend.h"

namespace nystrom_ext {
namespace {

struct Runtime {
  static constexpr auto kDevice = at::kCUDA;

  static void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
  static void check() { C10_CUDA_KERNEL_LAUNCH_CHECK(); }
  static int shared_memory() {
    int bytes = 0;
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, c10::cuda::current_device()));
    return bytes;
  }
};

const bool registered = (register_backend(at::kCUDA, CudaBackend<Runtime>::get()), true);

}  // namespace
}  // namespace nystrom_ext
