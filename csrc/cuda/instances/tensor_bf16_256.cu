#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_bf16_256 = make_schedule<TensorEngine<bf16, 256>>();

}  // namespace nystrom_ext::cuda
