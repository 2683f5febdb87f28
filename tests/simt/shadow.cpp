// Race mode: a record of the last accesses to every byte.
#if defined(SIMT_RACE)

#include "shadow.h"

#include <memory>
#include <unordered_map>

#include "order.h"

namespace simt::shadow {
namespace {

constexpr int kNobody = -1, kSeveral = -2;

// The last write, and the reads since that a later write must be ordered after. Epoch 0: none.
struct Cell {
  uint32_t write_epoch = 0, write_time = 0;
  uint32_t read_epoch = 0, read_time = 0, read_lanes = 0;
  int16_t writer = kNobody, reading_warp = kNobody;
  int16_t copier = kNobody;  // thread whose cp.async to here is in flight

  bool operator==(const Cell& other) const {
    return write_epoch == other.write_epoch && write_time == other.write_time && read_epoch == other.read_epoch &&
           read_time == other.read_time && read_lanes == other.read_lanes && writer == other.writer &&
           reading_warp == other.reading_warp && copier == other.copier;
  }
};

constexpr uintptr_t kPage = 1024;  // bytes of memory
struct Page {
  Cell cells[kPage];
};

constexpr size_t kMaxPages = 4096;  // more are forgotten, between launches
constexpr size_t kCached = 256;

struct Global {
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  struct {
    uintptr_t number;
    Page* page;
  } cache[kCached] = {};
};

struct State {
  Epochs epochs;
  std::vector<WarpOrder> warps;
  std::vector<Cell> shared;
  Global global;
} state;

Page& page(uintptr_t number) {
  Global& global = state.global;
  auto& cached = global.cache[number % kCached];
  if (cached.page == nullptr || cached.number != number) {
    auto& page = global.pages[number];
    if (!page) page = std::make_unique<Page>();
    cached = {number, page.get()};
  }
  return *cached.page;
}

enum class Space { shared, global };

// One byte's place in an access by `lane` of the current warp, or by all its lanes.
struct Access {
  const char* what;
  const char* at;
  Space space;
  int lane;
};
constexpr int kAllLanes = -1;

std::string place(const Access& a) {
  char text[80];
  if (a.space == Space::shared) {
    snprintf(text, sizeof(text), "%s at shared memory offset %td", a.what, a.at - machine.shared);
  } else {
    snprintf(text, sizeof(text), "%s at global memory %p", a.what, static_cast<const void*>(a.at));
  }
  return text;
}

int warp_number() { return machine.current / kLanes; }
WarpOrder& own_order() { return state.warps[warp_number()]; }

bool write_is_ordered(const Cell& cell, const Access& a) {
  const Epochs& epochs = state.epochs;
  if (epochs.in_earlier_block(cell.write_epoch)) return a.space == Space::shared;
  if (cell.write_epoch < epochs.now) return true;
  if (cell.writer / kLanes != warp_number()) return false;
  const int lane = cell.writer % kLanes;
  if (a.lane == kAllLanes) return own_order().known_to_all[lane] >= cell.write_time;
  return own_order().ordered(lane, cell.write_time, a.lane);
}

bool reads_are_ordered(const Cell& cell, const Access& a) {
  const Epochs& epochs = state.epochs;
  if (epochs.in_earlier_block(cell.read_epoch)) return a.space == Space::shared;
  if (cell.read_epoch < epochs.now) return true;
  if (cell.reading_warp != warp_number()) return false;
  for (uint32_t rest = cell.read_lanes; rest; rest &= rest - 1) {
    if (!own_order().ordered(int(first(rest)), cell.read_time, a.lane)) return false;
  }
  return true;
}

void check_last_write(const Cell& cell, const Access& a) {
  if (cell.copier != kNobody) {
    fail("race: %s, where a cp.async of thread %d is in flight", place(a).c_str(), cell.copier);
  }
  if (write_is_ordered(cell, a)) return;
  const bool other_block = state.epochs.in_earlier_block(cell.write_epoch);
  fail("race: %s, which thread %d%s wrote without a barrier since", place(a).c_str(), cell.writer,
       other_block ? " of another block" : "");
}

void note_read(Cell& cell, const Access& a) {
  const Epochs& epochs = state.epochs;
  const uint32_t lanes = a.lane == kAllLanes ? machine.warp().lanes : 1u << a.lane;
  // Another block's read conflicts with every write to come.
  if (a.space == Space::global && epochs.in_earlier_block(cell.read_epoch)) return;
  if (cell.read_epoch == epochs.now && cell.reading_warp != warp_number()) {
    cell.reading_warp = kSeveral;
    return;
  }
  const bool replaces = cell.read_epoch != epochs.now || a.lane == kAllLanes ||
                        (cell.read_time < own_order().now && reads_are_ordered(cell, a));
  cell.read_lanes = replaces ? lanes : cell.read_lanes | lanes;
  cell.read_epoch = epochs.now;
  cell.read_time = own_order().now;
  cell.reading_warp = int16_t(warp_number());
}

void read_cell(Cell& cell, const Access& a) {
  check_last_write(cell, a);
  if (a.space == Space::shared && !state.epochs.in_block(cell.write_epoch)) {
    fail("uninitialised: %s, which the block has not written", place(a).c_str());
  }
  note_read(cell, a);
}

void note_write(Cell& cell) {
  cell.write_epoch = state.epochs.now;
  cell.write_time = own_order().now;
  cell.writer = int16_t(machine.current);
  cell.read_epoch = 0;
}

void write_cell(Cell& cell, const Access& a) {
  check_last_write(cell, a);
  if (!reads_are_ordered(cell, a)) {
    const bool other_block = state.epochs.in_earlier_block(cell.read_epoch);
    fail("race: %s, which %s read without a barrier since", place(a).c_str(),
         other_block                          ? "another block"
         : cell.reading_warp == warp_number() ? "another lane of the warp"
                                              : "another warp");
  }
  note_write(cell);
}

Cell& shared_cell(const char* p) { return state.shared[size_t(p - machine.shared)]; }

Cell& global_cell(const char* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return page(address / kPage).cells[address % kPage];
}

// Checks and records the access to one byte after the other. Neighbours mostly have the same past.
template <class Cells, class Visit>
void visit_cells(size_t bytes, Access access, Cells cell_of, Visit visit) {
  Cell before, after;
  for (size_t i = 0; i < bytes; ++i, ++access.at) {
    Cell& cell = cell_of(access.at);
    if (i > 0 && cell == before) {
      cell = after;
      continue;
    }
    before = cell;
    visit(cell, access);
    after = cell;
  }
}

template <class Visit>
void visit(const void* p, size_t bytes, const char* what, int lane, Visit visit) {
  ++machine.stats.checked;
  const auto* at = static_cast<const char*>(p);
  const size_t size = machine.launch.shared_bytes;
  if (at < machine.shared || at >= machine.shared + size + kSharedPadding) {
    visit_cells(bytes, {what, at, Space::global, lane}, global_cell, visit);
  } else if (machine.in_shared(at, bytes)) {
    visit_cells(bytes, {what, at, Space::shared, lane}, shared_cell, visit);
  } else {
    fail("%s beyond shared memory: offset %td of %zu bytes", what, at - machine.shared, size);
  }
}

}  // namespace

void start_launch() {
  State& s = state;
  s.shared.assign(machine.launch.shared_bytes, Cell{});
  s.epochs.launch_begin = ++s.epochs.now;
  if (s.global.pages.size() < kMaxPages) return;
  s.global = {};
}

void start_block() {
  State& s = state;
  s.warps.assign(machine.warps.size(), WarpOrder{});
  s.epochs.block_begin = ++s.epochs.now;
}

void barrier() { ++state.epochs.now; }

void sync_warp(uint32_t mask) { own_order().sync(mask); }

void read(const void* p, size_t bytes, const char* what) { visit(p, bytes, what, machine.lane(), read_cell); }
void write(const void* p, size_t bytes, const char* what) { visit(p, bytes, what, machine.lane(), write_cell); }
void read_by_warp(const void* p, size_t bytes, const char* what) { visit(p, bytes, what, kAllLanes, read_cell); }

void copy_issued(Copy& copy) {
  copy.epoch = state.epochs.now;
  if (copy.valid) read(copy.from, 16, "cp.async from");
  write(copy.to, 16, "cp.async to");
  for (int i = 0; i < 16; ++i) shared_cell(copy.to + i).copier = int16_t(machine.current);
}

// The copy's write happens now for those that it is ordered before, and so does its read for later writes.
void copy_done(const Copy& copy) {
  for (int i = 0; i < 16; ++i) {
    Cell& cell = shared_cell(copy.to + i);
    cell.copier = kNobody;
    note_write(cell);
  }
  if (!copy.valid) return;
  const auto check_source = [&copy](Cell& cell, const Access& a) {
    if (cell.write_epoch > copy.epoch)
      fail("race: %s, which was written while the copy was in flight", place(a).c_str());
    read_cell(cell, a);
  };
  visit(copy.from, 16, "cp.async from", machine.lane(), check_source);
}

}  // namespace simt::shadow

#endif
