// The CPU kernels' table of contents: one entry per stage and part of a stage, each over a range of tasks.
//
// A task is the unit that a thread takes; what a task computes depends on the problem and its own number only, never on
// the number of threads or on the other tasks. `kernels.cpp` is compiled once per instruction set.
#pragma once

#include "../problem.h"

namespace nystrom_ext::cpu {

// Keys or queries per chunk: a function of m alone, so that results depend on nothing else. A chunk's m-sized partial
// sums stay below a sixteenth of the chunk's own rows.
constexpr int64_t chunk_length(int64_t m) { return m <= 64 ? 1024 : round_up(16 * m, 1024); }
inline Slots chunks(const Tokens& t, const Problem& p) { return {t, p.batch, chunk_length(p.landmarks)}; }

// Partial sums of one stage, reduced in chunk order. Large ones are those of a head's later chunks: the first chunk's
// are the result itself, to which the others are added.
struct Partials {
  void *a = nullptr, *b = nullptr, *c = nullptr;
};

// Throws; in memory.cpp.
[[noreturn]] void out_of_memory(int64_t bytes);

struct Kernels {
  // forward                                                            tasks; partials a, b, c
  void (*landmarks)(const Forward&, int64_t, int64_t);                        // (segment, problem)
  void (*key_pass)(const Forward&, const Partials&, int64_t, int64_t);        // (key chunk, head); U, maxima, sums
  void (*key_pass_merge)(const Forward&, const Partials&, int64_t, int64_t);  // problem
  void (*coefficient)(const Forward&, double* c, int64_t, int64_t);           // problem; for the option "global" only
  void (*core)(const Forward&, const double* c, int64_t, int64_t);            // problem; c null: each head's own
  void (*query_pass)(const Forward&, int64_t, int64_t);                       // (query chunk, head)

  // backward; what no gradient of `wanted` needs is neither read nor written
  void (*query_pass_backward)(const Backward&, const Partials&, int64_t,
                              int64_t);  // (query chunk, head); dW, dKt, dmissed
  void (*query_pass_backward_merge)(const Backward&, const Partials&, int64_t, int64_t);  // problem
  void (*core_backward)(const Backward&, const double* c, double* dc, int64_t, int64_t);  // problem
  void (*coefficient_backward)(const Backward&, int64_t problem, double dc);  // the one problem that attains a global c
  void (*key_pass_backward)(const Backward&, const Partials&, int64_t,
                            int64_t);  // (key chunk, key head); dQt, dconv
  void (*key_pass_backward_merge)(const Backward&, const Partials&, int64_t, int64_t);  // problem
  void (*landmarks_backward)(const Backward&, int64_t, int64_t);                        // (segment, problem)
};

// Kernels of the fastest instruction set this processor has, or of NYSTROM_CPU_CAPABILITY=default|avx2|avx512.
const Kernels& kernels(Dtype dtype);
const char* capability();

}  // namespace nystrom_ext::cpu
