#include "../stages.cuh"

namespace nystrom_ext::cuda {

template struct Stages<bf16>;

}  // namespace nystrom_ext::cuda
