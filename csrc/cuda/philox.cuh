// Dropout multipliers from Philox4x32-10: the same bits as csrc/cpu/philox.h, which describes the counters.
#pragma once

#include "sample.cuh"

namespace nystrom_ext::cuda {

class Philox {
 public:
  __device__ Philox(const Problem& p, int problem)
      : problem_(uint32_t(problem)), threshold_(uint64_t(p.dropout_p * 0x1p32)) {
    const uint64_t seed = uint64_t(p.rng_state[0]), offset = uint64_t(p.rng_state[1]);
    key0_ = uint32_t(seed);
    key1_ = uint32_t(seed >> 32) ^ uint32_t(offset >> 32);
    offset_ = uint32_t(offset);
  }

  // Whether dropout keeps the entry (row, column) of the attention matrix.
  __device__ bool keeps(int row, int column) const {
    uint32_t c[4] = {uint32_t(column / 4), uint32_t(row), problem_, offset_};
    uint32_t k0 = key0_, k1 = key1_;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
      c[0] = uint32_t(b >> 32) ^ c[1] ^ k0;
      c[1] = uint32_t(b);
      c[2] = uint32_t(a >> 32) ^ c[3] ^ k1;
      c[3] = uint32_t(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint32_t low = column & 1 ? c[1] : c[0], high = column & 1 ? c[3] : c[2];
    return (column & 2 ? high : low) >= threshold_;
  }

 private:
  uint32_t problem_, key0_, key1_, offset_;
  uint64_t threshold_;
};

// Dropout of one problem. Holds nothing, so that sweeps without dropout pay no registers for it.
struct Dropout {
  const Problem& p;
  int problem;

  __device__ bool on() const { return p.dropout_p > 0; }

  // One bit for each element (i, j) of a thread's Scores: whether it stays. entry(i, j, row, column) names its place in
  // the attention matrix, or returns false where it has none. A loop, not unrolled: the draws would fill the kernel.
  template <class E, class Entry>
  __device__ uint32_t kept(Entry entry) const {
    constexpr int kColumns = E::Scores::kColumns, kElements = E::kRowsPerThread * kColumns;
    static_assert(kElements <= 32, "one bit per element");
    const Philox philox(p, problem);
    uint32_t bits = 0;
#pragma unroll 1
    for (int x = 0; x < kElements; ++x) {
      int row = 0, column = 0;
      if (entry(x / kColumns, x % kColumns, row, column) && philox.keeps(row, column)) bits |= 1u << x;
    }
    return bits;
  }

  // x *= 1 / (1 - p) where kept, 0 elsewhere.
  template <class E>
  __device__ void apply(uint32_t kept, typename E::Scores& x) const {
    using A = typename E::Acc;
    const A multiplier = p.dropout_p < 1 ? A(1 / (1 - p.dropout_p)) : A(0);
#pragma unroll
    for (int i = 0; i < E::kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < E::Scores::kColumns; ++j) {
        x.at(i, j) *= kept >> (i * E::Scores::kColumns + j) & 1 ? multiplier : A(0);
      }
    }
  }
};

}  // namespace nystrom_ext::cuda
