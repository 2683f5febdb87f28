#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_half_32 = make_schedule<TensorEngine<half, 32>>();

}  // namespace nystrom_ext::cuda
