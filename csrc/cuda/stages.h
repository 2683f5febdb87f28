// The launches that no engine changes: compiled once per storage type, in instances/stages_*.cu.
#pragma once

#include "core_backward.cuh"
#include "landmarks.cuh"
#include "launch.h"

namespace nystrom_ext::cuda {

template <class P>
void run(const Device& device, void (*kernel)(P), int64_t blocks, int64_t tiles, int threads, int64_t shared,
         const P& parameters) {
  launch(kernel, dim3(unsigned(blocks), unsigned(tiles)), threads, size_t(shared), device.stream, parameters);
  device.launched();
}

// `shared`: bytes for the m x m matrices.
template <class T>
struct Stages {
  static void plan(const Device& device, const PlanParameters& p);
  static void landmarks(const Device& device, const Forward& f, bool aligned);  // aligned: rows of 16-byte pieces
  static void coefficients(const Device& device, const KeyPassParameters& p, int64_t shared);
  static void finish_core(const Device& device, const KeyPassParameters& p, int64_t shared);
  static void core_backward(const Device& device, const CoreBackwardParameters& p, int64_t shared);
  static void coefficient_backward(const Device& device, const CoreBackwardParameters& p, int64_t shared);
  static void landmarks_backward(const Device& device, const LandmarksBackwardParameters& p);
};

}  // namespace nystrom_ext::cuda
