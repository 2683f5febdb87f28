// What instances/stages_*.cu compile.
#pragma once

#include "stages.h"

namespace nystrom_ext::cuda {

constexpr int kCoreThreads = 256;

template <class T>
void Stages<T>::plan(const Device& device, const PlanParameters& p) {
  run(device, cuda::plan<kPlanThreads>, p.batch, 2, kPlanThreads, kPlanThreads / 32 * sizeof(int), p);
}

template <class T>
void Stages<T>::landmarks(const Device& device, const Forward& f, bool aligned) {
  constexpr int kVector = sizeof(T) == 2 ? 8 : 1;
  const int64_t blocks = f.problems() * f.segments(), bytes = kMeanThreads * sizeof(AccOf<T>);
  if (aligned) {
    run(device, cuda::landmarks<T, kVector>, blocks, 2, kMeanThreads, bytes * kVector, f);
  } else {
    run(device, cuda::landmarks<T, 1>, blocks, 2, kMeanThreads, bytes, f);
  }
}

template <class T>
void Stages<T>::coefficients(const Device& device, const KeyPassParameters& p, int64_t shared) {
  run(device, cuda::coefficients<AccOf<T>>, p.problems(), 1, kCoreThreads, shared, p);
}

template <class T>
void Stages<T>::finish_core(const Device& device, const KeyPassParameters& p, int64_t shared) {
  run(device, cuda::finish_core<T>, p.problems(), 1, kCoreThreads, shared, p);
}

template <class T>
void Stages<T>::core_backward(const Device& device, const CoreBackwardParameters& p, int64_t shared) {
  run(device, cuda::core_backward<T>, p.problems(), 1, kCoreThreads, shared, p);
}

template <class T>
void Stages<T>::coefficient_backward(const Device& device, const CoreBackwardParameters& p, int64_t shared) {
  run(device, cuda::coefficient_backward<AccOf<T>>, p.problems() > 0, 1, kCoreThreads, shared, p);
}

template <class T>
void Stages<T>::landmarks_backward(const Device& device, const LandmarksBackwardParameters& p) {
  const int64_t blocks =
      (p.wanted.query ? p.problems() * p.queries.landmarks : 0) + (p.wanted.conv && p.taps ? p.heads : 0);
  if (blocks > 0)
    run(device, cuda::landmarks_backward<T>, blocks, 1, kMeanThreads, p.head_width() * sizeof(AccOf<T>), p);
}

}  // namespace nystrom_ext::cuda
