// The stages in the order of csrc/ops/cpu.cpp, on threads of the standard library, which ThreadSanitizer understands.
#pragma once

#include <string>
#include <vector>

#include "call.h"

namespace nystrom_test {

// The kernels of one instruction set, by dtype.
struct InstructionSet {
  std::string name;
  const cpu::Kernels* kernels;
};

// Those that were compiled and that this processor has; the first one is every processor's.
const std::vector<InstructionSet>& instruction_sets();

class Schedule {
 public:
  // One thread takes all tasks at once; several take them one by one.
  Schedule(const InstructionSet& set, Call& call, int threads = 1);

  void landmarks();
  void key_pass();
  void core();
  void query_pass();
  void query_pass_backward();
  void core_backward();
  void key_pass_backward();
  void landmarks_backward();

  void forward();
  void backward();

 private:
  const cpu::Kernels& kernels_;
  Call& call_;
  int threads_;

  template <class F>
  void parallel(int64_t tasks, const F& run) const;
  int64_t later(const Slots& slots) const;
  // The largest coefficient of the batch and its problem.
  std::pair<double, int64_t> global_coefficient() const;
};

}  // namespace nystrom_test
