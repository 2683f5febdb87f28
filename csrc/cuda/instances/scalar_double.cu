#include "../launch.cuh"

namespace nystrom_ext::cuda {

const Schedule scalar_double = make_schedule<ScalarEngine<double>>();

}  // namespace nystrom_ext::cuda
