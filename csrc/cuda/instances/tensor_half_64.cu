#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_half_64 = make_schedule<TensorEngine<half, 64>>();

}  // namespace nystrom_ext::cuda
