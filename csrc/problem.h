// What a backend is given: sizes, options and strided pointers. No torch header, so that the kernel rooms need none.
#pragma once

#include <cstdint>

namespace nystrom_ext {

enum class Dtype : int { float64, float32, bfloat16, float16 };

// The m-sized buffers (landmarks, U, W and their gradients) have rows padded with zeros to a multiple of this many
// elements, so that every vector width divides them.
constexpr int64_t kRowAlign = 16;
constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t padded(int64_t n) { return round_up(n, kRowAlign); }
constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A (batch, head, token, feature) tensor; strides in elements.
struct Operand {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, feature = 0;
};

// The tokens of one side (queries or keys). Valid tokens are counted by rank; segments are cut over ranks, so padding
// never moves a boundary (mathematics.md, section 1).
//
// Packed samples lie one after another in an operand without a batch stride; positions are a sample's own there too.
struct Tokens {
  int64_t length = 0;                // L or S: positions per sample; packed, the most that one has
  int64_t landmarks = 0;             // rows of Qt or Kt per head: min(m, length)
  int64_t total = 0;                 // packed: positions of all samples
  const int64_t* first = nullptr;    // packed (batch + 1): where each sample's position 0 lies, then the total
  const bool* ignored = nullptr;     // (batch, length), true = padding; null: every token is valid
  const int64_t* count = nullptr;    // (batch): L' or S'
  const int64_t* index = nullptr;    // (batch, length): rank -> position; null: the identity
  const int64_t* offsets = nullptr;  // (batch, landmarks + 1): segment j holds ranks offsets[j] .. offsets[j + 1] - 1

  constexpr int64_t all(int64_t batch) const { return first ? total : batch * length; }
};

// Chunks of `size` ranks in each sample, numbered through all samples: chunk c of sample b is slot begin(b) + c, and
// the first chunk has a slot even where it is empty. Packed samples begin at the slot that follows from their first
// token, with no sum over the samples before; what that leaves over are few slots, at most one a sample.
struct Slots {
  const Tokens& tokens;
  int64_t batch, size;

  constexpr int64_t chunks() const { return tokens.length > size ? divide_up(tokens.length, size) : 1; }  // not packed
  constexpr int64_t begin(int64_t b) const { return tokens.first ? tokens.first[b] / size + b : b * chunks(); }
  constexpr int64_t all() const { return tokens.first ? tokens.total / size + batch : batch * chunks(); }
  constexpr int64_t sample(int64_t slot) const {
    if (!tokens.first) return slot / chunks();
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (begin(middle) <= slot ? low : high) = middle;
    }
    return low;
  }
};

struct Problem {
  Dtype dtype = Dtype::float32;
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t head_dim = 0, value_dim = 0;  // d, e
  int64_t landmarks = 0;                // m
  int64_t iterations = 6;               // Newton-Schulz
  int64_t taps = 0;                     // T of the convolution, 0 = none
  double scale = 1.0;                   // s
  double dropout_p = 0.0;
  bool global_coefficient = false;
  int64_t window = 0, pinned = 0;      // at most S; 0 and 0: the plain operator
  const int64_t* rng_state = nullptr;  // (2): seed, offset; null without dropout
  Operand query, key, value;           // (B, H, L, d), (B, H_kv, S, d), (B, H_kv, S, e)
  Operand conv_weight;                 // (H, T): strides head and token
  Tokens queries, keys;

  constexpr int64_t problems() const { return batch * heads; }  // N: one softmax problem per (sample, head)
  constexpr int64_t group() const { return heads / kv_heads; }  // query heads per key head
  constexpr bool extended() const { return window > 0 || pinned > 0; }
  constexpr int64_t columns() const { return keys.landmarks + pinned; }  // rows of Kt and W: landmarks, pinned tokens
  constexpr int64_t segments() const {                                   // rows of the longer of Qt and Kt
    return queries.landmarks > columns() ? queries.landmarks : columns();
  }
  constexpr int64_t head_width() const { return padded(head_dim); }    // row length of Qt, Kt
  constexpr int64_t value_width() const { return padded(value_dim); }  // row length of U, W
};

// Buffers hold the accumulation type: double for float64, float otherwise. Saved for backward: all but out.
struct Forward : Problem {
  Operand out;             // (B, H, L, e)
  void* qt = nullptr;      // (N, queries.landmarks, head_width)
  void* kt = nullptr;      // (N, columns, head_width)
  void* u = nullptr;       // (N, queries.landmarks, value_width)
  void* lse = nullptr;     // (N, queries.landmarks)
  void* w = nullptr;       // (N, columns, value_width)
  void* missed = nullptr;  // (N, queries.landmarks) if extended: log of the mass that the landmarks miss
};

// The gradients that are asked for. Nothing that serves the others alone is computed, and no bit of these depends on
// it.
struct Wanted {
  bool query = true, key = true, value = true, conv = true;

  constexpr bool scores() const { return query || key; }          // dS1, dS2, dS3: the reverse of every softmax
  constexpr bool tokens() const { return key || value; }          // what the key pass writes token by token
  constexpr bool attention() const { return scores() || value; }  // anything but the convolution's weight
};

// Null is what no gradient asked for needs; the name says which ones do: all that is left is for any but dconv alone.
struct Backward : Forward {  // out: the gradient dO that arrives
  Wanted wanted;
  Operand dquery, dkey, dvalue;  // zero at padded positions on entry
  void* dconv = nullptr;         // (H, T), accumulation type
  void* dqt = nullptr;           // (N, queries.landmarks, head_width): query
  void* dkt = nullptr;           // (N, columns, head_width): key
  void* du = nullptr;            // (N, queries.landmarks, value_width)
  void* dw = nullptr;            // (N, columns, value_width)
  void* delta = nullptr;         // (N, queries.landmarks): delta3 = rowsum(dU * U), less dmissed: scores
  void* dmissed = nullptr;       // (N, queries.landmarks) if extended: scores
  void* lse1 = nullptr;          // with a window, (sample, head, query) by rank: the backend's own
  void* delta1 = nullptr;        // likewise: rowsum(P1 * dP1)
};

}  // namespace nystrom_ext
