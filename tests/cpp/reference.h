// The stages of one (sample, head), forward and backward, as csrc/mathematics.md writes them: plain loops in double.
// Without dropout.
#pragma once

#include "call.h"
#include "matrix.h"

namespace nystrom_test {

struct Reference {
  enum Regime { empty, exact_keys, exact_queries, nystrom } regime;
  int64_t b, h, m, window, pinned;  // window, pinned: 0 outside the Nyström regime
  double scale;
  std::vector<int64_t> positions, keys;  // of the valid queries and keys
  std::vector<int64_t> ends, key_ends;   // of the segments of ranks, from 0 on
  Matrix q, k, v, dout;                  // of the valid tokens

  // forward: rows of kt and w behind the landmarks are the pinned tokens
  Matrix qt, kt, u, lse, a, w, missed, out;
  std::vector<Matrix> z;  // of the iteration
  double c = 0;
  int64_t argmax = 0;  // the column of A that attains c

  // backward, in the order of the stages; empty where a regime has no such matrix
  Matrix dw, dkt_of_queries, dmissed, lse1, delta1, dq_of_queries, dp1;
  Matrix du, delta, da, dqt_of_core, dkt;
  double dc = 0;
  Matrix dk, dv, dqt, dconv;
  Matrix dq;

  // Tokens that key landmark j stands for.
  int64_t count(int64_t j) const;

 private:
  friend std::vector<Reference> reference(const Call& call);
  Matrix p1, near, values;  // P1 with the window's columns behind those of W

  void describe(const Call& call, int64_t problem);
  void landmarks();
  void key_pass();
  void similarity();
  void core(int64_t iterations);
  void query_pass(const Call& call);
  void query_pass_backward();
  void core_backward_to_similarity();
  void core_backward_from_similarity();
  void key_pass_backward(const Call& call);
  void landmarks_backward();
  Matrix convolved(const Call& call, const Operand& x, const Tokens& tokens, int64_t head, int64_t shift, bool reversed,
                   const std::vector<int64_t>& at) const;
};

// One for each problem of the call.
std::vector<Reference> reference(const Call& call);

}  // namespace nystrom_test
