#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_half_256 = make_schedule<TensorEngine<half, 256>>();

}  // namespace nystrom_ext::cuda
