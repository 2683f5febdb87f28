// Which thread runs next, and the barrier of the block.
#include <cstdarg>
#include <cstdio>

#include "machine.h"
#include "shadow.h"

namespace simt {

Builtins builtins;
Machine machine;

uint32_t Machine::draw(uint32_t below) {  // xorshift32
  random ^= random << 13;
  random ^= random >> 17;
  random ^= random << 5;
  return uint32_t(uint64_t(random) * below >> 32);
}

bool Machine::in_shared(const void* p, size_t bytes) const {
  const auto* c = static_cast<const char*>(p);
  return c >= shared && c + bytes <= shared + launch.shared_bytes;
}

void fail(const char* format, ...) {
  char reason[500], where[120];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, sizeof(reason), format, arguments);
  va_end(arguments);
  const uint3 block = builtins.block;
  snprintf(where, sizeof(where), "block (%u,%u,%u) thread %d (warp %d lane %d): ", block.x, block.y, block.z,
           machine.current, machine.current / kLanes, machine.lane());
  machine.error = std::string(where) + reason;
  leave(machine.host);
}

namespace {

// The first set bit from `start` on, cyclically.
int first_from(uint32_t lanes, int start) {
  const uint32_t after = lanes >> start << start;
  return int(first(after ? after : lanes));
}

int ready_warp() {
  const int n = int(machine.warps.size()), own = machine.current / kLanes;
  if (machine.warps[own].ready) return own;
  const int start = machine.random_order() ? int(machine.draw(uint32_t(n))) : own + 1;
  for (int i = 0; i < n; ++i) {
    const int w = (start + i) % n;
    if (machine.warps[w].ready) return w;
  }
  return -1;
}

}  // namespace

// Stays in the warp while it can: its lanes meet soonest, and warps drift as far apart as barriers allow.
int pick() {
  const int w = ready_warp();
  if (w < 0) return -1;
  const int start = machine.random_order() ? int(machine.draw(kLanes)) : (machine.lane() + 1) % kLanes;
  return w * kLanes + first_from(machine.warps[w].ready, start);
}

void resume(int thread) {
  Thread& from = machine.self();
  if (thread == machine.current) return;
  Thread& to = machine.threads[thread];
  machine.current = thread;
  builtins.thread = to.index;
  switch_to(from.fiber, to.fiber);
}

void wait_until_ready() {
  const int next = pick();
  if (next < 0)
    fail("deadlock: %d threads at __syncthreads, %d exited%s", machine.arrived, machine.exited, waiting_lanes());
  resume(next);
}

void thread_main() {
  arrived();
  machine.launch.kernel(machine.launch.parameters);
  check_no_copies();
  if (machine.arrived) fail("exits while %d threads wait at __syncthreads", machine.arrived);
  Warp& warp = machine.warp();
  warp.ready &= ~machine.bit();
  warp.exited |= machine.bit();
  ++machine.exited;
  const int next = pick();
  if (next >= 0) resume(next);
  if (machine.exited < int(machine.threads.size())) fail("exits while others wait%s", waiting_lanes());
  leave(machine.host);
}

}  // namespace simt

void __syncthreads() {
  using namespace simt;
  Warp& warp = machine.warp();
  if (machine.exited) fail("__syncthreads after %d threads of the block have exited", machine.exited);
  for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
    const Request& r = warp.request[first(rest)];
    if (r.mask & machine.bit()) fail("divergence: __syncthreads, while lane %u waits in %s", first(rest), name(r.op));
  }
  let_copies_land();
  ++machine.arrived;
  warp.ready &= ~machine.bit();
  warp.at_barrier |= machine.bit();
  if (machine.arrived < int(machine.threads.size())) {
    wait_until_ready();
    return;
  }
  machine.arrived = 0;
  ++machine.stats.barriers;
  shadow::barrier();
  for (Warp& w : machine.warps) {
    w.ready = w.lanes;
    w.at_barrier = 0;
  }
  if (machine.random_order()) resume(int(machine.draw(uint32_t(machine.threads.size()))));
}
