#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_bf16_64 = make_schedule<TensorEngine<bf16, 64>>();

}  // namespace nystrom_ext::cuda
