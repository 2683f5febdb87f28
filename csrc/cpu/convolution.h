// The depthwise convolution over the sequence, y_i = sum_t w_t x_{i + t - shift}, with zeros outside and at padding.
//
// Forward: x = V, shift = T/2. Backward: dV is the same convolution of dO with the taps reversed and shift = T-1-T/2;
// dw_t = sum_i <dO_i, V_{i + t - T/2}>.
#pragma once

#include "tile.h"

namespace {

template <class T>
struct Convolution {
  using A = Acc<T>;
  Rows<T> x;            // index unused: positions
  const bool* ignored;  // (length) of this sample, null: none
  int64_t length, taps, shift;
  const A* w;
  A* window;  // (kBlock + taps) rows

  // Rows position - shift .. position + n + taps - 2 - shift of x, as window rows 0 .. n + taps - 2.
  void read(int64_t position, int64_t n) const {
    const int64_t width = padded(x.columns);
    for (int64_t i = 0; i < n + taps - 1; ++i) {
      const int64_t at = position - shift + i;
      if (at < 0 || at >= length || (ignored && ignored[at])) {
        fill(window + i * width, width, A(0));
      } else {
        x.read(at, window + i * width);
      }
    }
  }

  // out (n, width) += the convolution at the window's n positions: 4 rows at a time share each row of x.
  void accumulate(int64_t n, Place<A> out) const {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) rows<4>(i, out);
    for (; i < n; ++i) rows<1>(i, out);
  }

  // dw (taps, one vector each) += sum_i x_{i + t - shift} * y_i, lane by lane.
  void correlate(int64_t n, const A* y, int64_t ld, A* dw) const {
    constexpr int W = Simd<A>::width;
    const int64_t width = padded(x.columns);
    for (int64_t t = 0; t < taps; ++t) {
      Vec<A> total = load(dw + t * W);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < width; c += W) total += load(y + i * ld + c) * load(window + (i + t) * width + c);
      }
      store(dw + t * W, total);
    }
  }

 private:
  template <int R>
  void rows(int64_t first, Place<A> out) const {
    constexpr int W = Simd<A>::width;
    const int64_t width = padded(x.columns);
    for (int64_t c = 0; c < width; c += W) {
      Vec<A> acc[R] = {};
      for (int64_t k = 0; k < taps + R - 1; ++k) {
        const Vec<A> v = load(window + (first + k) * width + c);
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) {
          if (k >= r && k - r < taps) acc[r] += w[k - r] * v;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        A* to = out.data + (first + r) * out.ld + c;
        store(to, load(to) + acc[r]);
      }
    }
  }
};

// Calls run(first, count) for each run of consecutive positions among ranks first .. first + n - 1.
template <class F>
void for_each_run(const int64_t* index, int64_t first, int64_t n, F run) {
  for (int64_t i = 0; i < n;) {
    int64_t count = 1;
    if (index == nullptr) count = n - i;
    while (i + count < n && index[first + i + count] == index[first + i] + count) ++count;
    run(i, index ? index[first + i] : first + i, count);
    i += count;
  }
}

// The taps of head h as accumulators, reversed for the backward pass.
template <class T>
void read_taps(const Problem& p, int64_t h, bool reversed, Acc<T>* to) {
  const T* w = static_cast<const T*>(p.conv_weight.data) + h * p.conv_weight.head;
  for (int64_t t = 0; t < p.taps; ++t) to[t] = to_acc(w[(reversed ? p.taps - 1 - t : t) * p.conv_weight.token]);
}

}  // namespace
