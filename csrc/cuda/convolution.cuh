// The depthwise convolution over the sequence, y_i = sum_t w_t x_{i + t - shift}, with zeros outside and at padding.
//
// Forward: x = V, shift = T/2. Backward: dV is the convolution of dO with the taps reversed and shift = T-1-T/2, and
// dw_t = sum <dO_i, V_j> over i + t - T/2 = j. On tensor cores y = B x with the band matrix B_ik = w_{k - i + shift}.
#pragma once

#include "scalar_engine.cuh"
#include "tensor_engine.cuh"

namespace nystrom_ext::cuda {

template <class T>
struct Convolution {
  Rows<const T> x;  // by position
  const bool* ignored;
  int length;
  const T* weight;
  int64_t weight_stride;
  int taps, shift;
  bool reversed;

  __device__ bool valid(int position) const {
    return position >= 0 && position < length && !(ignored && ignored[position]);
  }
  __device__ AccOf<T> w(int t) const {
    return t >= 0 && t < taps ? to_acc(weight[(reversed ? taps - 1 - t : t) * weight_stride]) : AccOf<T>(0);
  }
};

template <class T>
__device__ Convolution<T> value_convolution(const Forward& f, const Head& s) {
  return {key_rows<const T>(f.value, s, f.value_dim).by_position(),
          f.keys.ignored ? f.keys.ignored + s.b * f.keys.length : nullptr,
          s.keys.positions,
          static_cast<const T*>(f.conv_weight.data) + s.h * f.conv_weight.head,
          f.conv_weight.token,
          int(f.taps),
          int(f.taps / 2),
          false};
}

// Of dO, for query head h.
template <class T>
__device__ Convolution<T> gradient_convolution(const Backward& g, const Head& s, int h) {
  return {rows<const T>(g.out, s.b, h, g.value_dim, s.queries).by_position(),
          g.queries.ignored ? g.queries.ignored + s.b * g.queries.length : nullptr,
          s.queries.positions,
          static_cast<const T*>(g.conv_weight.data) + h * g.conv_weight.head,
          g.conv_weight.token,
          int(g.taps),
          int(g.taps - 1 - g.taps / 2),
          true};
}

// One warp's 16 rows of a tile against windows of 16 positions.
template <class E>
struct BandProduct {
  using T = typename E::T;

  const Convolution<T>& c;
  int position[2];  // of this thread's rows; far away where there is none
  int from, to;     // positions that the warp's rows reach
  T* window;
  float* square;

  __device__ BandProduct(const Convolution<T>& convolution, const Side& side, int first, int count, char* scratch)
      : c(convolution) {
    const int warp = threadIdx.x / 32;
    window = reinterpret_cast<T*>(scratch) + warp * 16 * E::kOut;
    square = reinterpret_cast<float*>(scratch + 4 * 16 * E::kOut * sizeof(T)) + warp * 16 * 17;
    for (int i = 0; i < 2; ++i) {
      position[i] = E::row(i) < count ? side.position(first + E::row(i)) : -(1 << 30);
    }
    const int top = E::warp_row();
    from = to = 0;
    if (top < count) {
      from = side.position(first + top) - c.shift;
      to = side.position(first + min(top + 15, count - 1)) + c.taps - c.shift;
    }
  }

  static __device__ int at(int row, int chunk) {
    return row * E::kOut + ((chunk ^ (E::kOut >= 64 ? row & 7 : row >> 1 & 3)) << 3);
  }

  // Rows k .. k + 15 of x, columns out0 .. out0 + kOut - 1.
  __device__ void read(int k, int out0) const {
    __syncwarp();
    for (int i = E::lane(); i < 2 * E::kOut; i += 32) {
      const int r = i / (E::kOut / 8), chunk = i % (E::kOut / 8), column = out0 + 8 * chunk;
      const bool valid = c.valid(k + r) && column < c.x.columns;
      const uint4 v = valid ? *reinterpret_cast<const uint4*>(c.x.at(k + r) + column) : make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(window + at(r, chunk)) = v;
    }
    __syncwarp();
  }

  __device__ void terms(uint32_t (&f)[E::kTokenTerms][4], int row, int chunk, bool trans) const {
    typename E::template Tokens<16>{window}.terms(f, at(row, chunk), trans);
  }

  __device__ void convolve(typename E::Output& out, int k) const {
    uint32_t band[E::kTokenTerms][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int t = k + E::lane() % 4 * 2 + 8 * (r >> 1) - position[r & 1] + c.shift;
      if constexpr (E::kTokenTerms == 2) {
        split(c.w(t), c.w(t + 1), band[0][r], band[1][r]);
      } else {
        band[0][r] = pack<bf16>(c.w(t), c.w(t + 1));
      }
    }
#pragma unroll
    for (int n = 0; n < E::kOut / 16; ++n) {
      uint32_t fx[E::kTokenTerms][4];
      terms(fx, E::lane() & 15, 2 * n + (E::lane() >> 4), true);
      E::multiply(out.x[2 * n], out.x[2 * n + 1], band, fx);
    }
  }

  // taps[t] += the diagonal sums of y x^T, y the tile's own rows.
  template <class Tile>
  __device__ void correlate(const Tile& y, int k, int out0, float* taps) const {
    float g[2][4] = {};
#pragma unroll
    for (int n = 0; n < E::kOut / 16; ++n) {
      uint32_t fy[E::kTokenTerms][4], fx[E::kTokenTerms][4];
      y.terms(fy, E::at(E::warp_row() + (E::lane() & 15), out0 / 8 + 2 * n + (E::lane() >> 4)), false);
      terms(fx, (E::lane() & 7) + (E::lane() >> 4) * 8, 2 * n + (E::lane() >> 3 & 1), false);
      E::multiply(g[0], g[1], fy, fx);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        square[(E::lane() / 4 + 8 * (e >> 1)) * 17 + 8 * n + E::lane() % 4 * 2 + (e & 1)] = g[n][e];
      }
    }
    __syncwarp();
    for (int t0 = 0; t0 < c.taps; t0 += 32) {
      float sum = 0;
      for (int r = 0; r < 16; ++r) {
        const int at = __shfl_sync(~0u, r < 8 ? position[0] : position[1], r % 8 * 4);
        const int column = at + c.taps / 2 - (t0 + E::lane()) - k;
        if (column >= 0 && column < 16) sum += square[r * 17 + column];
      }
      if (t0 + E::lane() < c.taps) taps[int(threadIdx.x / 32) * c.taps + t0 + E::lane()] += sum;
    }
  }
};

template <class T, int D, int C, int O>
__device__ void convolve(TensorEngine<T, D, C, O>, typename TensorEngine<T, D, C, O>::Output& out,
                         const Convolution<T>& c, const Side& side, int first, int count, int out0, char* scratch) {
  const BandProduct<TensorEngine<T, D, C, O>> band(c, side, first, count, scratch);
  for (int k = band.from; k < band.to; k += 16) {
    band.read(k, out0);
    band.convolve(out, k);
  }
}

// dV and dw of one tile, those that are wanted: y holds the tile's rows of V.
template <class T, int D, int C, int O, class Tile>
__device__ void convolve_backward(TensorEngine<T, D, C, O>, const Wanted& wanted,
                                  typename TensorEngine<T, D, C, O>::Output& out, const Tile& y,
                                  const Convolution<T>& c, const Side& side, int first, int count, int out0,
                                  float* taps, char* scratch) {
  const BandProduct<TensorEngine<T, D, C, O>> band(c, side, first, count, scratch);
  for (int k = band.from; k < band.to; k += 16) {
    band.read(k, out0);
    if (wanted.value) band.convolve(out, k);
    if (wanted.conv) band.correlate(y, k, out0, taps);
  }
}

template <class T, int O>
__device__ void convolve(ScalarEngine<T, O>, typename ScalarEngine<T, O>::Output& out, const Convolution<T>& c,
                         const Side& side, int first, int count, int out0, char*) {
  using E = ScalarEngine<T, O>;
  for (int i = 0; i < E::kRowsPerThread; ++i) {
    if (E::row(i) >= count) break;
    const int position = side.position(first + E::row(i)) - c.shift;
    for (int t = 0; t < c.taps; ++t) {
      if (!c.valid(position + t)) continue;
      for (int j = 0; j < E::Output::kColumns; ++j) {
        const int column = out0 + E::column(j);
        if (column < c.x.columns) out.at(i, j) += c.w(t) * to_acc(c.x.at(position + t)[column * c.x.feature]);
      }
    }
  }
}

template <class T, int O, class Tile>
__device__ void convolve_backward(ScalarEngine<T, O> engine, const Wanted& wanted,
                                  typename ScalarEngine<T, O>::Output& out, const Tile& y, const Convolution<T>& c,
                                  const Side& side, int first, int count, int out0, AccOf<T>* taps, char* scratch) {
  using E = ScalarEngine<T, O>;
  if (wanted.value) convolve(engine, out, c, side, first, count, out0, scratch);
  for (int t = threadIdx.x / 32; wanted.conv && t < c.taps; t += E::kThreads / 32) {  // a warp per tap
    AccOf<T> sum = 0;
    for (int r = 0; r < count; ++r) {
      const int i = side.position(first + r) + c.taps / 2 - t;
      if (!c.valid(i)) continue;
      for (int column = threadIdx.x % 32; column < E::kOut && out0 + column < c.x.columns; column += 32) {
        sum += y.get(r, out0 + column) * to_acc(c.x.at(i)[(out0 + column) * c.x.feature]);
      }
    }
    for (int lane = 1; lane < 32; lane *= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    if (threadIdx.x % 32 == 0) taps[t] += sum;
  }
}

// Rows of taps that a block sums for itself before they are added up.
template <class T, int D, int C, int O>
constexpr int tap_rows(TensorEngine<T, D, C, O>) {
  return 4;
}
template <class T, int O>
constexpr int tap_rows(ScalarEngine<T, O>) {
  return 1;
}

}  // namespace nystrom_ext::cuda
