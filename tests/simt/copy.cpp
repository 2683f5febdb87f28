// cp.async: copies that land at some moment between their issue and their wait, which a seed chooses.
#include <algorithm>

#include "machine.h"
#include "shadow.h"

namespace simt {
namespace {

constexpr uint32_t kDelays = 6;

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

}  // namespace

void let_copies_land() {
  if (!machine.random_order()) return;
  for (Copy& copy : machine.self().copies) {
    if (copy.delay-- == 0) land(copy);
  }
}

void check_no_copies() {
  const size_t n = machine.self().copies.size();
  if (n) fail("exits with %zu cp.async copies that it has not waited for", n);
}

void cp_async16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) fail("cp.async: destination not aligned to 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async: source not aligned to 16 bytes");
  auto* to = static_cast<char*>(shared);
  if (!machine.in_shared(to, 16)) {
    fail("cp.async: destination outside shared memory: offset %td of %zu bytes", to - machine.shared,
         machine.launch.shared_bytes);
  }
  Thread& self = machine.self();
  Copy copy = {to, static_cast<const char*>(global), valid, false, self.group, 0, 0};
  shadow::copy_issued(copy);
  if (machine.random_order()) {
    copy.delay = machine.draw(kDelays);
    if (copy.delay-- == 0) land(copy);
  }
  self.copies.push_back(copy);
}

void cp_async_commit() { ++machine.self().group; }

void cp_async_wait(int pending) {
  Thread& self = machine.self();
  const int64_t limit = int64_t(self.group) - pending;
  auto& copies = self.copies;
  const auto done = std::find_if(copies.begin(), copies.end(), [=](const Copy& c) { return c.group >= limit; });
  for (auto copy = copies.begin(); copy != done; ++copy) {
    land(*copy);
    shadow::copy_done(*copy);
  }
  copies.erase(copies.begin(), done);
}

}  // namespace simt
