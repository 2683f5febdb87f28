#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule tensor_bf16_128 = make_schedule<TensorEngine<bf16, 128>>();

}  // namespace nystrom_ext::cuda
