// Rows of a strided operand, in rank order, as tiles of the accumulation type.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace {

using namespace nystrom_ext;
using namespace nystrom_ext::cpu;

// Scratch of one thread, taken piece by piece. A null base only counts, so that one list of takes both sizes and
// places.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class A>
  A* take(int64_t n) {
    A* p = base_ ? reinterpret_cast<A*>(base_ + used_) : nullptr;
    used_ += round_up(n * int64_t(sizeof(A)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// `Layout` is a struct of pointers whose constructor takes them from an Arena; it lives as long as this object.
template <class Layout>
class Scratch {
 public:
  template <class... Args>
  explicit Scratch(const Args&... args) {
    Arena count(nullptr);
    Layout(count, args...);
    memory_ = static_cast<char*>(__builtin_malloc(size_t(count.used() + 64)));
    if (memory_ == nullptr) out_of_memory(count.used());
    Arena arena(reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory_), 64)));
    layout_ = Layout(arena, args...);
  }
  ~Scratch() { __builtin_free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const Layout* operator->() const { return &layout_; }
  const Layout& operator*() const { return layout_; }

 private:
  char* memory_ = nullptr;
  Layout layout_;
};

template <class A>
struct Tile {
  const A* data;
  int64_t ld;
};

template <class A>
struct Place {
  A* data;
  int64_t ld;
};

// Asks for a row that is needed soon and not yet in the caches.
template <class T>
inline void prefetch_row(const T* row, int64_t columns) {
  for (int64_t x = 0; x < columns; x += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + x);
}

template <class T>
struct Rows {
  using A = Acc<T>;
  T* data;  // position 0 of one sample and head
  int64_t token, feature, columns;
  const int64_t* index;  // rank -> position, null: the identity

  int64_t position(int64_t rank) const { return index ? index[rank] : rank; }
  Rows by_position() const { return {data, token, feature, columns, nullptr}; }

  // One row as accumulators; zeros up to padded(columns).
  void read(int64_t position, A* to) const {
    const T* from = data + position * token;
    int64_t x = 0;
    if (feature == 1) {
      for (; x + Simd<A>::width <= columns; x += Simd<A>::width) store(to + x, load_as(from + x));
    }
    for (; x < columns; ++x) to[x] = to_acc(from[x * feature]);
    for (; x < padded(columns); ++x) to[x] = A(0);
  }

  void write(int64_t position, const A* from) const {
    T* to = data + position * token;
    int64_t x = 0;
    if (feature == 1) {
      for (; x + Simd<A>::width <= columns; x += Simd<A>::width) store_as(to + x, load(from + x));
    }
    for (; x < columns; ++x) to[x * feature] = from_acc<T>(from[x]);
  }

  // Where to work on ranks first .. first + count - 1: in the operand's own memory if its layout allows, else
  // `scratch`.
  Place<A> place(int64_t first, int64_t count, A* scratch) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      const bool run = index == nullptr || index[first + count - 1] - index[first] == count - 1;
      if (run && feature == 1 && columns % kRowAlign == 0) return {data + position(first) * token, token};
    }
    return {scratch, padded(columns)};
  }
  Tile<A> read(int64_t first, int64_t count, A* scratch) const {
    const Place<A> at = place(first, count, scratch);
    if (at.data != scratch) return {at.data, at.ld};
    for (int64_t i = 0; i < count; ++i) {
      if (feature == 1) prefetch_row(data + (position(first + i) + count) * token, columns);  // about the next tile's
      read(position(first + i), scratch + i * at.ld);
    }
    return {scratch, at.ld};
  }
  // Nothing is left to do where `from` is the operand's own memory, as `place` may have given it.
  void write(int64_t first, int64_t count, Place<A> from) const {
    if (static_cast<void*>(from.data) == data + position(first) * token) return;
    for (int64_t i = 0; i < count; ++i) write(position(first + i), from.data + i * from.ld);
  }
};

}  // namespace
