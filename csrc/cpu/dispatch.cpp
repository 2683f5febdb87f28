// Which of the compiled instruction sets runs. The only file besides setup.py that knows their names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace nystrom_ext::cpu {

extern const Kernels kernels_default[4];
#ifdef __x86_64__
extern const Kernels kernels_avx2[4], kernels_avx512[4];
#endif

namespace {

struct Capability {
  const char* name;
  const Kernels* kernels;
  bool available;
};

Capability choose() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Capability all[] = {
      {"avx512", kernels_avx512, avx512}, {"avx2", kernels_avx2, avx2}, {"default", kernels_default, true}};
#else
  const Capability all[] = {{"default", kernels_default, true}};
#endif
  const char* wanted = std::getenv("NYSTROM_CPU_CAPABILITY");
  for (const Capability& c : all) {
    if (wanted ? c.name == std::string(wanted) : c.available) {
      if (c.available) return c;
    }
  }
  throw std::runtime_error("NYSTROM_CPU_CAPABILITY=" + std::string(wanted) +
                           ": this build or processor does not have it; use default, avx2 or avx512, or unset it");
}

const Capability& chosen() {
  static const Capability capability = choose();
  return capability;
}

}  // namespace

const Kernels& kernels(Dtype dtype) { return chosen().kernels[int(dtype)]; }
const char* capability() { return chosen().name; }

}  // namespace nystrom_ext::cpu
