// Dropout multipliers from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Counter-based, so the backward pass and every other backend draw the same bits again: key = seed, with the offset's
// high word xored into its high word; counter = (column / 4, row, problem, the offset's low word); word column % 4 of
// the result drops an entry when it is below p 2^32.
#pragma once

#include "tile.h"

namespace {

class Dropout {
 public:
  Dropout(const Problem& p, int64_t problem)
      : on_(p.dropout_p > 0), problem_(uint32_t(problem)), threshold_(uint64_t(p.dropout_p * 0x1p32)) {
    if (!on_) return;
    const uint64_t seed = uint64_t(p.rng_state[0]), offset = uint64_t(p.rng_state[1]);
    key0_ = uint32_t(seed);
    key1_ = uint32_t(seed >> 32) ^ uint32_t(offset >> 32);
    offset_ = uint32_t(offset);
    multiplier_ = p.dropout_p < 1 ? 1 / (1 - p.dropout_p) : 0;
  }

  bool on() const { return on_; }

  // x[column] *= multiplier(row, column) for columns 0 .. n - 1.
  template <class A>
  void apply(int64_t row, A* x, int64_t n) const {
    uint32_t word[4][kGroups];
    for (int64_t first = 0; first < n; first += 4 * kGroups) {
      draw(uint32_t(first / 4), uint32_t(row), word);
      const int64_t count = n - first < 4 * kGroups ? n - first : 4 * kGroups;
      for (int64_t j = 0; j < count; ++j) x[first + j] *= keep<A>(word[j % 4][j / 4]);
    }
  }

  // x[i * stride] *= multiplier(row, position of rank first + i), for columns that are tokens (`index`: rank ->
  // position).
  template <class A>
  void apply(int64_t row, const int64_t* index, int64_t first, int64_t count, A* x, int64_t stride) const {
    uint32_t word[4][kGroups];
    int64_t drawn = -1;  // column / (4 kGroups) of `word`
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = index ? index[first + i] : first + i, group = column / (4 * kGroups);
      if (group != drawn) draw(uint32_t(group * kGroups), uint32_t(row), word);
      drawn = group;
      x[i * stride] *= keep<A>(word[column % 4][column / 4 % kGroups]);
    }
  }

 private:
  static constexpr int kGroups = 8;  // counters drawn at a time, side by side in vector registers

  template <class A>
  A keep(uint32_t word) const {
    return word >= threshold_ ? A(multiplier_) : A(0);
  }

  void draw(uint32_t counter, uint32_t row, uint32_t (&word)[4][kGroups]) const {
    uint32_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
    for (int i = 0; i < kGroups; ++i) {
      c0[i] = counter + uint32_t(i);
      c1[i] = row;
      c2[i] = problem_;
      c3[i] = offset_;
    }
    uint32_t k0 = key0_, k1 = key1_;
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kGroups; ++i) {
        const uint64_t a = 0xD2511F53ull * c0[i], b = 0xCD9E8D57ull * c2[i];
        c0[i] = uint32_t(b >> 32) ^ c1[i] ^ k0;
        c1[i] = uint32_t(b);
        c2[i] = uint32_t(a >> 32) ^ c3[i] ^ k1;
        c3[i] = uint32_t(a);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < kGroups; ++i) {
      word[0][i] = c0[i];
      word[1][i] = c1[i];
      word[2][i] = c2[i];
      word[3][i] = c3[i];
    }
  }

  bool on_;
  uint32_t problem_, key0_ = 0, key1_ = 0, offset_ = 0;
  uint64_t threshold_;
  double multiplier_ = 1;
};

// P1's rows: queries by position, columns by landmark.
template <class A>
void drop_rows(const Dropout& dropout, const Head& s, int64_t first, int64_t n, A* x, int64_t ld) {
  for (int64_t i = 0; i < n; ++i) {
    dropout.apply(s.query_index ? s.query_index[first + i] : first + i, x + i * ld, s.columns());
  }
}

}  // namespace
