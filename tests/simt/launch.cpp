// A launch: every block of the grid, one after the other.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "machine.h"
#include "shadow.h"

namespace simt {

Options& options() { return machine.options; }
Stats& stats() { return machine.stats; }
void reset_stats() { machine.stats = {}; }
void* dynamic_smem() { return machine.shared; }

namespace {

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// Of exactly this size, so that the address sanitizer sees an overrun.
std::unique_ptr<char, Free> allocate_shared(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 1024, bytes + shadow::kSharedPadding) != 0) throw std::bad_alloc();
  return std::unique_ptr<char, Free>(static_cast<char*>(p));
}

void check(bool condition, const char* message) {
  if (!condition) throw Error(std::string("invalid launch: ") + message);
}

void check_configuration(const Launch& launch) {
  const dim3 g = launch.grid, b = launch.block;
  check(g.x && g.y && g.z && b.x && b.y && b.z, "a dimension is 0");
  check(g.x < 1u << 31 && g.y < 1u << 16 && g.z < 1u << 16, "the grid is too large");
  check(uint64_t(b.x) * b.y * b.z <= kMaxThreads && b.z <= 64, "the block has too many threads");
  check(launch.shared_bytes <= machine.options.max_smem, "too much dynamic shared memory");
  check(!machine.running, "inside a kernel");
}

void start_block() {
  const dim3 block = machine.launch.block;
  const int n = int(machine.threads.size());
  std::memset(machine.shared, 0xff, machine.launch.shared_bytes);  // NaN in every type
  char* stack = stacks(n);
  std::fill(machine.warps.begin(), machine.warps.end(), Warp{});
  for (int t = 0; t < n; ++t) {
    Thread& thread = machine.threads[t];
    thread.index = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
    thread.group = 0;
    thread.copies.clear();
    thread.fiber.start(stack + t * kStackStride, size_t(t % 16) * 256, thread_main);
    machine.warps[t / kLanes].lanes |= 1u << t % kLanes;
  }
  for (Warp& warp : machine.warps) warp.ready = warp.lanes;
  machine.arrived = machine.exited = machine.current = 0;
  shadow::start_block();
}

void run_block(uint64_t number) {
  const dim3 grid = machine.launch.grid;
  builtins.block = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
  start_block();
  if (machine.random_order()) machine.current = pick();
  builtins.thread = machine.self().index;
  machine.running = true;
  switch_to(machine.host, machine.self().fiber);
  machine.running = false;
}

std::vector<uint64_t> order_of_blocks() {
  const dim3 grid = machine.launch.grid;
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  if (machine.random_order()) {
    for (uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.draw(uint32_t(i))]);
  }
  return order;
}

}  // namespace

void run(const Launch& launch) {
  check_configuration(launch);
  const auto shared = allocate_shared(launch.shared_bytes);
  const size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
  machine.launch = launch;
  machine.shared = shared.get();
  machine.random = machine.options.seed * 0x9E3779B1u | 1;
  machine.error.clear();
  machine.threads.resize(threads);
  machine.warps.resize((threads + kLanes - 1) / kLanes);
  builtins.grid_dim = launch.grid;
  builtins.block_dim = launch.block;
  ++machine.stats.launches;
  shadow::start_launch();
  for (const uint64_t block : order_of_blocks()) {
    run_block(block);
    if (!machine.error.empty()) throw Error(machine.error);
  }
}

}  // namespace simt
