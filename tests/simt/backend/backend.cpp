// The CUDA backend with its kernels in the emulator: once loaded, the operator runs it on CPU tensors, so that every
// test of the operator is a test of the CUDA source.
#include <torch/library.h>

#include "../../../csrc/ops/cuda_backend.h"
#include "simt.h"

namespace nystrom_ext {
namespace {

struct Runtime {
  static constexpr auto kDevice = at::kCPU;
  static void* stream() { return nullptr; }
  static void check() {}
  static int shared_memory() { return int(simt::options().max_smem); }
};

const bool registered = (register_backend(at::kCPU, CudaBackend<Runtime>::get()), true);

TORCH_LIBRARY(nystrom_simt, m) {
  m.def("options(int seed, int shared_memory) -> ()", [](int64_t seed, int64_t shared_memory) {
    simt::options().seed = uint32_t(seed);
    simt::options().max_smem = size_t(shared_memory);
  });
  m.def("stats() -> int[]", [] {
    const simt::Stats& s = simt::stats();
    const std::vector<int64_t> all{int64_t(s.launches), int64_t(s.barriers),           int64_t(s.mma),
                                   int64_t(s.ldmatrix), int64_t(s.ldmatrix_conflicts), int64_t(s.checked)};
    return all;
  });
  m.def("reset_stats() -> ()", [] { simt::reset_stats(); });
}

}  // namespace
}  // namespace nystrom_ext
