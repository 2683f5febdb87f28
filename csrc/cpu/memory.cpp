// The error of a kernel that gets no memory. Not inline: copies are compiled for instruction sets that not every
// processor has.
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace nystrom_ext::cpu {

void out_of_memory(int64_t bytes) {
  throw std::runtime_error("nystrom_attention: not enough memory for " + std::to_string(bytes) +
                           " bytes that a thread works in; the backward pass keeps about (4 pinv_iterations + 13) "
                           "num_landmarks^2 numbers, lower them or torch.set_num_threads");
}

}  // namespace nystrom_ext::cpu
