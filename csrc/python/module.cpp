// The Python extension module: how the library was built. Tensors go through the dispatcher, never through here.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#define NYSTROM_STRING_(x) #x
#define NYSTROM_STRING(x) NYSTROM_STRING_(x)

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = NYSTROM_STRING(NYSTROM_VERSION);
        info["torch"] = TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["cxx_standard"] = __cplusplus;
#ifdef NYSTROM_CUDA
        info["cuda"] = NYSTROM_STRING(NYSTROM_CUDA);
#else
        info["cuda"] = pybind11::none();
#endif
        return info;
      },
      "Facts fixed when the extension was compiled.");
}
