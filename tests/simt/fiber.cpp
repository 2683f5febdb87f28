#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(SIMT_HAS_UCONTEXT)
extern "C" void simt_jump(void** from, void* to) __attribute__((visibility("hidden")));

// Saves what the System V ABI says a call preserves, changes stacks, restores.
asm(R"(
  .text
  .hidden simt_jump
  .globl simt_jump
  .type simt_jump, @function
simt_jump:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_jump, .-simt_jump
)");
#endif

namespace simt {
namespace {

Fiber* departed;  // the fiber of the last switch

// `fake_stack`: where to keep the sanitizer's own state of the fiber that is left, null if it is left for good.
void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}

void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** stack,
                  [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#endif
}

}  // namespace

#if defined(SIMT_HAS_UCONTEXT)

void Fiber::start(char* stack, size_t skew, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = kStackBytes;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes - skew;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::jump(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

#else

void Fiber::start(char* stack, size_t skew, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = kStackBytes;
  // Six registers, the address that `ret` takes, and a return address for `entry`, aligned as after a call.
  constexpr int kRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + kStackBytes - skew) - 2;
  top[1] = nullptr;
  top[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= kRegisters; ++i) top[-i] = nullptr;
  stack_pointer_ = top - kRegisters;
}

void Fiber::jump(Fiber& from, Fiber& to) { simt_jump(&from.stack_pointer_, to.stack_pointer_); }

#endif

void arrived() { after_switch(nullptr, &departed->stack_, &departed->stack_bytes_); }

void switch_to(Fiber& from, Fiber& to) {
  void* fake_stack = nullptr;
  before_switch(&fake_stack, to.stack_, to.stack_bytes_);
  departed = &from;
  Fiber::jump(from, to);
  after_switch(fake_stack, nullptr, nullptr);
}

void leave(Fiber& to) {
  static Fiber dead;
  before_switch(nullptr, to.stack_, to.stack_bytes_);
  departed = &dead;
  Fiber::jump(dead, to);
  __builtin_unreachable();
}

char* stacks(int count) {
  static char* memory = nullptr;
  static int usable = 0;
  if (memory == nullptr) {
    void* reserved =
        mmap(nullptr, kMaxThreads * kStackStride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(reserved) + kGuardBytes;
  }
  for (; usable < count; ++usable) {
    if (mprotect(memory + usable * kStackStride, kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
#if defined(__SANITIZE_ADDRESS__)
  // Fibers that were left for good inside functions leave marks.
  for (int i = 0; i < count; ++i) __asan_unpoison_memory_region(memory + i * kStackStride, kStackBytes);
#endif
  return memory;
}

}  // namespace simt
