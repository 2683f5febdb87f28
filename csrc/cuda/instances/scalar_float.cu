#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule scalar_float = make_schedule<ScalarEngine<float>>();

}  // namespace nystrom_ext::cuda
