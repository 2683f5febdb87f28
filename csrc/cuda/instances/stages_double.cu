#include "../stages.cuh"

namespace nystrom_ext::cuda {

template struct Stages<double>;

}  // namespace nystrom_ext::cuda
