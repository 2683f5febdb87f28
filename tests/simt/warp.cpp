// Operations of a warp: its lanes meet, and the last to arrive acts for all.
#include "machine.h"
#include "shadow.h"

namespace simt {

const char* name(Op op) {
  static const char* const names[] = {
      "__syncwarp",    "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
      "__ballot_sync", "mma",         "ldmatrix",       "ldmatrix.trans"};
  return names[int(op)];
}

namespace {

struct ShuffleData {
  uint64_t value, result;
  int source;  // lane index of __shfl_sync
};

struct BallotData {
  bool predicate;
  uint32_t result;
};

// The lane that `lane` reads, itself where the source is outside its segment of `width` lanes.
int source_of(Op op, int lane, int index, int delta, int width) {
  const int begin = lane / width * width, end = begin + width;
  switch (op) {
    case Op::shuffle_index:
      return begin + (index & (width - 1));
    case Op::shuffle_up:
      return lane - delta >= begin ? lane - delta : lane;
    case Op::shuffle_down:
      return lane + delta < end ? lane + delta : lane;
    default:
      return (lane ^ delta) < end ? lane ^ delta : lane;
  }
}

void execute_shuffle(const Warp& warp, const Request& request) {
  for (uint32_t rest = request.mask; rest; rest &= rest - 1) {
    const int lane = int(first(rest));
    auto* to = static_cast<ShuffleData*>(warp.request[lane].data);
    const int source = source_of(request.op, lane, to->source, request.operand, request.width);
    if (!(request.mask >> source & 1)) {
      fail("%s: lane %d reads lane %d, which is not in mask %08x", name(request.op), lane, source, request.mask);
    }
    to->result = static_cast<const ShuffleData*>(warp.request[source].data)->value;
  }
}

void execute_ballot(const Warp& warp, uint32_t mask) {
  uint32_t result = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const uint32_t lane = first(rest);
    result |= uint32_t(static_cast<const BallotData*>(warp.request[lane].data)->predicate) << lane;
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    static_cast<BallotData*>(warp.request[first(rest)].data)->result = result;
  }
}

void execute(const Warp& warp, const Request& request) {
  switch (request.op) {
    case Op::syncwarp:
      return shadow::sync_warp(request.mask);
    case Op::ballot:
      return execute_ballot(warp, request.mask);
    case Op::mma:
      return execute_mma(warp);
    case Op::ldmatrix:
      return execute_ldmatrix(warp, false);
    case Op::ldmatrix_trans:
      return execute_ldmatrix(warp, true);
    default:
      return execute_shuffle(warp, request);
  }
}

void check_agreement(const Warp& warp, const Request& mine) {
  const char* const op = name(mine.op);
  if (!(mine.mask & machine.bit())) fail("%s: the calling lane is not in mask %08x", op, mine.mask);
  if (mine.mask & ~warp.lanes) fail("%s: mask %08x names lanes that the block does not have", op, mine.mask);
  if (const uint32_t gone = mine.mask & warp.exited) fail("divergence: %s, after lanes %08x have exited", op, gone);
  if (const uint32_t away = mine.mask & warp.at_barrier) {
    fail("divergence: %s, while lanes %08x wait at __syncthreads", op, away);
  }
  const uint32_t met = mine.mask & warp.waiting;
  if (!met) return;
  const Request& other = warp.request[first(met)];
  if (!mine.agrees(other) && (other.mask & machine.bit())) {  // each waits for the other
    fail("divergence: %s (mask %08x, operand %d), while lane %u waits in %s (mask %08x, operand %d)", op, mine.mask,
         mine.operand, first(met), name(other.op), other.mask, other.operand);
  }
}

// Lanes of the mask may still be in an operation of a smaller mask.
bool complete(const Warp& warp, const Request& request) {
  if (request.mask & ~warp.waiting) return false;
  for (uint32_t rest = request.mask; rest; rest &= rest - 1) {
    if (!request.agrees(warp.request[first(rest)])) return false;
  }
  return true;
}

}  // namespace

const char* waiting_lanes() {
  static std::string text;  // kept: the caller fails, and nothing is destroyed then
  text.clear();
  for (size_t w = 0; w < machine.warps.size(); ++w) {
    const Warp& warp = machine.warps[w];
    if (!warp.waiting) continue;
    char part[120];
    const Request& r = warp.request[first(warp.waiting)];
    snprintf(part, sizeof(part), "; warp %zu: lanes %08x wait in %s (mask %08x)", w, warp.waiting, name(r.op), r.mask);
    text += part;
  }
  return text.c_str();
}

void together(const Request& request) {
  Warp& warp = machine.warp();
  check_agreement(warp, request);
  let_copies_land();
  warp.request[machine.lane()] = request;
  warp.waiting |= machine.bit();
  warp.ready &= ~machine.bit();
  if (!complete(warp, request)) {
    wait_until_ready();
    return;
  }
  execute(warp, request);
  warp.waiting &= ~request.mask;
  warp.ready |= request.mask;
  // Now and then another warp goes first, or another lane of this one.
  if (machine.random_order() && machine.draw(8) == 0) {
    const Warp& other = machine.warps[machine.draw(uint32_t(machine.warps.size()))];
    if (other.ready) resume(int(&other - machine.warps.data()) * kLanes + int(first(other.ready)));
  }
}

uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width) {
  const Op op = Op(int(Op::shuffle_index) + int(kind));
  if (width < 1 || width > kLanes || (width & (width - 1))) fail("%s: width %d is not a power of two", name(op), width);
  const bool own = kind == Shuffle::index;  // each lane names its own source
  if (!own && (operand < 0 || operand >= kLanes)) fail("%s: operand %d is not in 0..31", name(op), operand);
  ShuffleData data = {bits, 0, own ? operand : 0};
  together({op, mask, &data, own ? 0 : operand, width});
  return data.result;
}

}  // namespace simt

void __syncwarp(uint32_t mask) { simt::together({simt::Op::syncwarp, mask}); }

uint32_t __ballot_sync(uint32_t mask, int predicate) {
  simt::BallotData data = {predicate != 0, 0};
  simt::together({simt::Op::ballot, mask, &data});
  return data.result;
}
