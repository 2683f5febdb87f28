#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_bf16_32 = make_schedule<TensorEngine<bf16, 32>>();

}  // namespace nystrom_ext::cuda
