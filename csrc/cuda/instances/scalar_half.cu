#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule scalar_half = make_schedule<ScalarEngine<half>>();

}  // namespace nystrom_ext::cuda
