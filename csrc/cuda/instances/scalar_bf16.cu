#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule scalar_bf16 = make_schedule<ScalarEngine<bf16>>();

}  // namespace nystrom_ext::cuda
