// P and dS of a tile whose softmax runs over rows: the statistics belong to its columns (mathematics.md, section 3).
#pragma once

#include "philox.cuh"
#include "sweep.cuh"

namespace nystrom_ext::cuda {

// LSE, in units of 1 / unit, and rowsum(P * dP) of columns first .. end - 1 of the tile; null where nobody asks for dS.
template <class A>
struct ColumnStatistics {
  const A *lse, *delta;
  int first, end;
  A unit;
};

// Scores p and D * dP become D * P and dS; live(i, j): whether the entry is one, kept(): the dropout's bits.
template <class E, class Kept, class Live>
__device__ void differentiate_columns(typename E::Scores& p, typename E::Scores& ds,
                                      const ColumnStatistics<typename E::Acc>& of, typename E::Acc scale,
                                      const Dropout& dropout, bool drops, Kept kept, Live live) {
  using A = typename E::Acc;
  uint32_t bits = 0;
  if (drops) {
    bits = kept();
    dropout.apply<E>(bits, ds);
  }
#pragma unroll
  for (int j = 0; j < E::Scores::kColumns; ++j) {
    const int column = of.first + E::column(j);
    const bool valid = column < of.end;
    const A top = valid ? of.lse[column] * of.unit : A(kInfinity), mean = valid && of.delta ? of.delta[column] : A(0);
#pragma unroll
    for (int i = 0; i < E::kRowsPerThread; ++i) {
      p.at(i, j) = live(i, j) ? probability<E>(p.at(i, j) * scale, top) : A(0);
      ds.at(i, j) = p.at(i, j) * (ds.at(i, j) - mean);
    }
  }
  if (drops) dropout.apply<E>(bits, p);
}

}  // namespace nystrom_ext::cuda
