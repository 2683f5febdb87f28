// Race mode: kernels are compiled with -fsanitize=thread and linked with these functions in the place of its library,
// so that each of their loads and stores is seen.
#if defined(SIMT_RACE)

#include "shadow.h"

namespace simt {
namespace {

// Whether the kernel may share what is there: not its own stack, nor threadIdx and the like.
bool is_shareable(const void* p) {
  if (!machine.running) return false;
  const auto* c = static_cast<const char*>(p);
  const auto* index = reinterpret_cast<const char*>(&builtins);
  if (c >= index && c < index + sizeof(builtins)) return false;
  const ptrdiff_t offset = c - stacks(0);
  if (offset < 0 || offset >= ptrdiff_t(kMaxThreads * kStackStride)) return true;
  const int owner = int(offset / ptrdiff_t(kStackStride));
  if (owner != machine.current) fail("access to a local variable of thread %d", owner);
  return false;
}

void load(const void* p, size_t bytes) {
  if (is_shareable(p)) shadow::read(p, bytes, "load");
}
void store(const void* p, size_t bytes) {
  if (is_shareable(p)) shadow::write(p, bytes, "store");
}

}  // namespace
}  // namespace simt

// The compiler chooses the names, one per size.
#define SIMT_HOOK __attribute__((visibility("hidden"))) void
#define SIMT_HOOKS(kind, bytes)                                           \
  SIMT_HOOK __tsan_##kind##read##bytes(void* p) { simt::load(p, bytes); } \
  SIMT_HOOK __tsan_##kind##write##bytes(void* p) { simt::store(p, bytes); }
#define SIMT_HOOKS_OF_SIZE(bytes) \
  SIMT_HOOKS(, bytes)             \
  SIMT_HOOKS(unaligned_, bytes)   \
  SIMT_HOOKS(volatile_, bytes)    \
  SIMT_HOOKS(unaligned_volatile_, bytes)

extern "C" {
SIMT_HOOKS_OF_SIZE(1)
SIMT_HOOKS_OF_SIZE(2)
SIMT_HOOKS_OF_SIZE(4)
SIMT_HOOKS_OF_SIZE(8)
SIMT_HOOKS_OF_SIZE(16)
SIMT_HOOK __tsan_read_range(void* p, size_t bytes) { simt::load(p, bytes); }
SIMT_HOOK __tsan_write_range(void* p, size_t bytes) { simt::store(p, bytes); }
SIMT_HOOK __tsan_init() {}
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}
SIMT_HOOK __tsan_vptr_read(void**) {}
SIMT_HOOK __tsan_vptr_update(void**, void*) {}
// Host code beside the kernels: whether a static variable of a function is initialised.
__attribute__((visibility("hidden"))) char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}

#endif
