#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_half_128 = make_schedule<TensorEngine<half, 128>>();

}  // namespace nystrom_ext::cuda
