// When two accesses of the launch are ordered: which moments a lane knows to be past.
//
// An epoch lasts from one __syncthreads to the next; epochs are numbered through blocks and launches and never repeat.
// Within an epoch, lanes of one warp learn of each other's accesses by __syncwarp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "machine.h"

namespace simt::shadow {

// Time in a warp advances with every __syncwarp.
struct WarpOrder {
  uint32_t now = 1;
  uint32_t known[kLanes][kLanes] = {};  // [i][j]: lane i is behind all that lane j did up to then
  uint32_t known_to_all[kLanes] = {};   // least over i != j

  bool ordered(int earlier, uint32_t time, int later) const {
    return earlier == later || known[later][earlier] >= time;
  }

  void sync(uint32_t mask) {
    uint32_t joined[kLanes] = {};
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const uint32_t* row = known[first(rest)];
      for (int j = 0; j < kLanes; ++j) joined[j] = std::max(joined[j], row[j]);
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1) joined[first(rest)] = now;
    for (uint32_t rest = mask; rest; rest &= rest - 1) std::copy_n(joined, kLanes, known[first(rest)]);
    ++now;
    for (int j = 0; j < kLanes; ++j) {
      known_to_all[j] = now;
      for (int i = 0; i < kLanes; ++i) {
        if (i != j) known_to_all[j] = std::min(known_to_all[j], known[i][j]);
      }
    }
  }
};

struct Epochs {
  uint32_t now = 0, block_begin = 0, launch_begin = 0;

  bool in_block(uint32_t epoch) const { return epoch >= block_begin; }
  bool in_earlier_block(uint32_t epoch) const { return epoch >= launch_begin && epoch < block_begin; }
};

}  // namespace simt::shadow
