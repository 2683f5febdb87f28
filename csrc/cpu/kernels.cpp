// The kernels of one instruction set, for every dtype. Compiled several times: NYSTROM_CAPABILITY names the table,
// NYSTROM_VECTOR_BYTES sets the vector width, and the compiler flags allow the instructions (setup.py). Only headers
// without shared inline functions may be included here: the linker would merge those across instruction sets.
#include "kernels.h"

#include "core_backward.h"
#include "key_pass_backward.h"
#include "landmarks.h"
#include "query_pass.h"

namespace {

template <class T>
constexpr nystrom_ext::cpu::Kernels table() {
  return {landmarks<T>,
          key_pass<T>,
          key_pass_merge<T>,
          core_coefficient<T>,
          core<T>,
          query_pass<T>,
          query_pass_backward<T>,
          query_pass_backward_merge<T>,
          core_backward<T>,
          coefficient_backward<T>,
          key_pass_backward<T>,
          key_pass_backward_merge<T>,
          landmarks_backward<T>};
}

}  // namespace

namespace nystrom_ext::cpu {

extern const Kernels NYSTROM_CAPABILITY[4];
const Kernels NYSTROM_CAPABILITY[4] = {table<double>(), table<float>(), table<bfloat16>(), table<float16>()};

}  // namespace nystrom_ext::cpu
