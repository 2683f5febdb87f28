// Stage `landmarks`: Qt_j, Kt_j = means of Q, K over the valid tokens of segment j, and the plan of valid tokens that
// all stages read (mathematics.md, sections 1 and 2).
#pragma once

#include "matrix.cuh"
#include "tiling.h"

namespace nystrom_ext::cuda {

constexpr int kPlanThreads = 256, kPlanRun = 16;  // flags per thread and step
constexpr int kMeanThreads = 128;

struct PlanParameters : Problem {
  int64_t *query_plan, *key_plan;  // count (batch), offsets (batch, landmarks + 1), index (batch, length)
};

// Ranks of one sample's valid tokens: counts before each thread's run by a scan over warps.
inline __device__ int64_t scan_mask(const Tokens& t, const bool* ignored, int64_t* index) {
  int* warps = reinterpret_cast<int*>(dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t total = 0;
  for (int64_t start = 0; start < t.length; start += kPlanThreads * kPlanRun) {
    const int64_t first = start + threadIdx.x * kPlanRun, end = min(first + kPlanRun, t.length);
    int own = 0;
    for (int64_t i = first; i < end; ++i) own += !ignored[i];
    int before = own;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += left;
    }
    if (lane == 31) warps[warp] = before;
    __syncthreads();
    int64_t rank = total + before - own;
    for (int w = 0; w < kPlanThreads / 32; ++w) {
      if (w < warp) rank += warps[w];
      total += warps[w];
    }
    for (int64_t i = first; i < end; ++i) {
      if (!ignored[i]) index[rank++] = i;
    }
    __syncthreads();
  }
  return total;
}

inline __device__ void plan_side(const Tokens& t, const Problem& p, int64_t* plan) {
  const int64_t b = blockIdx.x;
  int64_t *count = plan + b, *offsets = plan + p.batch + b * (t.landmarks + 1);
  int64_t* index = plan + p.batch * (t.landmarks + 2) + b * t.length;
  const int64_t n = scan_mask(t, t.ignored + b * t.length, index);
  const int64_t segments = min(n, t.landmarks);
  for (int64_t j = threadIdx.x; j <= segments; j += kPlanThreads) offsets[j] = segments == 0 ? 0 : j * n / segments;
  if (threadIdx.x == 0) *count = n;
}

// Grid: batch x (queries, keys).
template <int kThreads>
__global__ void __launch_bounds__(kThreads) plan(const __grid_constant__ PlanParameters p) {
  if (blockIdx.y == 0 && p.query_plan) plan_side(p.queries, p, p.query_plan);
  if (blockIdx.y == 1 && p.key_plan) plan_side(p.keys, p, p.key_plan);
}

// N elements of a row at once: 16 bytes where the layout allows, else one.
template <class T, int N>
__device__ __forceinline__ void read(const T* from, AccOf<T> (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = to_acc(*from);
  } else {
    T x[N];
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    memcpy(static_cast<void*>(x), &v, 16);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_acc(x[i]);
  }
}

// The mean of ranks begin .. end - 1. Threads share the columns and stride over the rows; sums are of at most 64 rows
// each, then of those, then over the threads in order: the error grows with the logarithm of the segment, nearly.
template <class T, int N>
__device__ void segment_mean(const Rows<const T>& x, int begin, int end, AccOf<T>* mean) {
  using A = AccOf<T>;
  A* partial = reinterpret_cast<A*>(dynamic_shared_memory());  // (threads, N)
  const int width = int(padded(x.columns)), parts = int(divide_up(width, N)), across = min(parts, kMeanThreads),
            down = kMeanThreads / across;
  const int part0 = threadIdx.x % across, first = threadIdx.x / across;
  for (int part = part0; part - part0 < parts; part += across) {  // the same number of turns for all threads
    const int column = part * N;
    A total[N] = {}, block[N] = {}, v[N];
    int rows = 0;
    for (int r = begin + first; r < end && first < down && column < x.columns; r += down) {
      read<T, N>(x.row(r) + column * x.feature, v);
#pragma unroll
      for (int i = 0; i < N; ++i) block[i] += v[i];
      if (++rows % 64) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += block[i], block[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) partial[threadIdx.x * N + i] = total[i] + block[i];
    __syncthreads();
    if (first == 0 && part < parts) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A sum = 0;
        for (int r = 0; r < down; ++r) sum += partial[(r * across + part0) * N + i];
        if (column + i < width) mean[column + i] = sum / A(max(end - begin, 1));  // an empty segment: zeros
      }
    }
    __syncthreads();
  }
}

// Grid: (problem, segment) x (queries, keys).
template <class T, int N>
__global__ void __launch_bounds__(kMeanThreads) landmarks(const __grid_constant__ Forward f) {
  using A = AccOf<T>;
  const int segments = int(f.segments());
  const Head s(f, int(blockIdx.x) / segments);
  const int j = int(blockIdx.x) % segments;
  const bool queries = blockIdx.y == 0;
  if (j >= (queries ? s.queries.rows : s.columns())) return;
  const Operand x = queries ? f.query : f.key;
  const int begin = queries ? s.queries.begin(j) : s.key_begin(j);
  const int end = queries ? s.queries.begin(j + 1) : s.key_end(j);
  const int64_t width = f.head_width(), rows_of_side = queries ? f.queries.landmarks : f.columns();
  segment_mean<T, N>(rows<const T>(x, s.b, queries ? s.h : s.kv, f.head_dim, queries ? s.queries : s.keys), begin, end,
                     slice<A>(queries ? f.qt : f.kt, s.n, rows_of_side, width) + j * width);
}

struct LandmarksBackwardParameters : Backward {
  const void* dqt_part;    // (chunks of keys, H, queries.landmarks, head_width)
  const void* dconv_part;  // (row chunks of keys, H, output tiles, taps)
  int64_t output_tiles;
};

// dw of one head: its parts over samples and chunks. A warp takes a tap, and a lane every 32nd part of a sample.
template <class A>
__device__ void merge_taps(const LandmarksBackwardParameters& g, int64_t h) {
  const Slots slots = row_chunks(g, g.keys);
  const int tiles = int(g.output_tiles), stride = int(g.heads) * tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int t = warp; t < g.taps; t += kMeanThreads / 32) {
    A sum = 0;
    for (int b = 0; b < g.batch; ++b) {
      const A* from = static_cast<const A*>(g.dconv_part) + (slots.begin(b) * g.heads + h) * tiles * g.taps + t;
      const int used = int(divide_up(Side(g.keys, b, g.landmarks).count, kRowChunk)) * tiles;
      for (int c = lane; c < used; c += 32) sum += from[(int64_t(c / tiles) * stride + c % tiles) * g.taps];
    }
    sum = warp_sum(sum);
    if (lane == 0) static_cast<A*>(g.dconv)[h * g.taps + t] = sum;
  }
}

// Adds each query landmark's gradient to the queries it is the mean of: dQ_i += dQt_j / |segment j|, with dQt_j the
// core's share and the chunks of the key pass in order. Grid: (problem, query segment) for dQ, then a block per head
// for dconv.
template <class T>
__global__ void __launch_bounds__(kMeanThreads)
    landmarks_backward(const __grid_constant__ LandmarksBackwardParameters g) {
  using A = AccOf<T>;
  const int segments = int(g.queries.landmarks), width = int(g.head_width()), block = int(blockIdx.x);
  const int all = g.wanted.query ? int(g.problems()) * segments : 0;
  if (block >= all) return merge_taps<A>(g, block - all);
  const Head s(g, block / segments);
  const int j = block % segments;
  if (j >= s.queries.rows || !s.has_key_pass()) return;

  A* share = reinterpret_cast<A*>(dynamic_shared_memory());  // (width)
  const int64_t used = divide_up(s.keys.count, kChunk), next = g.heads * segments * width;
  const A* part = static_cast<const A*>(g.dqt_part) + (first_part(g, s, chunks(g, g.keys)) * segments + j) * width;
  for (int c = threadIdx.x; c < width; c += kMeanThreads) {
    A sum = slice<A>(g.dqt, s.n, segments, width)[j * width + c];
    for (int64_t k = s.pinned / kChunk; k < used; ++k) sum += part[k * next + c];
    share[c] = sum / A(s.queries.size(j));
  }
  __syncthreads();
  const Rows<T> dq = query_rows<T>(g.dquery, s, g.head_dim);
  // Threads side by side on a row's columns; several rows at once where a row is short.
  const int across = min(dq.columns, kMeanThreads), down = kMeanThreads / across, end = s.queries.begin(j + 1);
  for (int i = s.queries.begin(j) + int(threadIdx.x) / across; i < end; i += down) {
    T* row = dq.row(i);
    if (int(threadIdx.x) / across == down) break;
    for (int c = threadIdx.x % across; c < dq.columns; c += across) {
      row[c * dq.feature] = from_acc<T>(to_acc(row[c * dq.feature]) + share[c]);
    }
  }
}

}  // namespace nystrom_ext::cuda
