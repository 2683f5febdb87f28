// The machine's state: one block at a time, of which one thread at a time runs until it must wait.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

constexpr int kLanes = 32, kMaxThreads = 1024;

enum class Op : uint8_t {
  syncwarp,
  shuffle_index,
  shuffle_up,
  shuffle_down,
  shuffle_butterfly,
  ballot,
  mma,
  ldmatrix,
  ldmatrix_trans,
};
const char* name(Op);

inline uint32_t first(uint32_t lanes) { return uint32_t(__builtin_ctz(lanes)); }

// What a lane brings to an operation of its warp. All but `data`, which is on its stack, must be the same for all
// lanes.
struct Request {
  Op op;
  uint32_t mask;
  void* data = nullptr;
  int operand = 0, width = kLanes;  // of shuffles

  bool agrees(const Request& other) const {
    return op == other.op && mask == other.mask && operand == other.operand && width == other.width;
  }
};

// A cp.async under way. `delay`: operations of its thread until it lands, in a random schedule.
struct Copy {
  char* to;
  const char* from;
  bool valid, landed;
  uint32_t group, delay, epoch;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  uint32_t group;  // of copies not yet committed
  std::vector<Copy> copies;
};

// Sets of lanes. A lane is in exactly one of ready, waiting (in an operation of the warp), at_barrier, exited.
struct Warp {
  uint32_t lanes, ready, waiting, at_barrier, exited;
  Request request[kLanes];
};

struct Machine {
  Options options;
  Stats stats;

  Launch launch;
  char* shared;  // launch.shared_bytes
  uint32_t random;
  bool running;  // a fiber, and not the host
  Fiber host;
  std::string error;

  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int current;  // thread
  int arrived;  // threads at the barrier
  int exited;

  Thread& self() { return threads[current]; }
  Warp& warp() { return warps[current / kLanes]; }
  int lane() const { return current % kLanes; }
  uint32_t bit() const { return 1u << lane(); }
  bool random_order() const { return options.seed != 0; }
  uint32_t draw(uint32_t below);
  bool in_shared(const void* p, size_t bytes) const;
};
extern Machine machine;

// Ends the launch with an error of the current thread. Callable from any depth of a fiber; nothing is unwound, so what
// needs a destructor is lost.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// ---- schedule.cpp

int pick();               // a ready thread, or -1
void resume(int thread);  // go on there
void wait_until_ready();  // the current thread has left its warp's ready set
void thread_main();       // a fiber's entry

// ---- warp.cpp

// Waits for all lanes of the mask to bring the same request; the last one executes it for all.
void together(const Request& request);
const char* waiting_lanes();  // for error messages

// ---- matrix.cpp

void execute_mma(const Warp&);
void execute_ldmatrix(const Warp&, bool trans);

// ---- copy.cpp

void let_copies_land();  // some of the current thread's, in a random schedule
void check_no_copies();

}  // namespace simt
