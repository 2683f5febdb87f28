#include "../stages.cuh"

namespace nystrom_ext::cuda {

template struct Stages<half>;

}  // namespace nystrom_ext::cuda
