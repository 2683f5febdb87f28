// Flows of control with stacks of their own, of which one runs at a time: a CUDA thread is a fiber.
#pragma once

#include <cstddef>

#if defined(SIMT_UCONTEXT) || !defined(__x86_64__)
#define SIMT_HAS_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

#if defined(SIMT_RACE) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

class Fiber;
void switch_to(Fiber& from, Fiber& to);  // returns when somebody switches to `from`
[[noreturn]] void leave(Fiber& to);      // for good
void arrived();                          // the first call of a fiber

class Fiber {
 public:
  // The next switch_to calls `entry`, which calls arrived() first and never returns. What ran before is forgotten.
  void start(char* stack, size_t skew, void (*entry)());

 private:
  friend void switch_to(Fiber& from, Fiber& to);
  friend void leave(Fiber& to);
  friend void arrived();

  static void jump(Fiber& from, Fiber& to);

#if defined(SIMT_HAS_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  // For the address sanitizer. Those of the fiber that called first become known as it is left.
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
};

// Stacks for `count` fibers, each with a page below it that faults; kept until the process ends. Stack i begins at
// stacks(count) + i * kStackStride.
constexpr size_t kGuardBytes = 4096, kStackStride = kStackBytes + kGuardBytes;
char* stacks(int count);

}  // namespace simt
