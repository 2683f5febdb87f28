#include "../stages.cuh"

namespace nystrom_ext::cuda {

template struct Stages<float>;

}  // namespace nystrom_ext::cuda
