// The emulator's own tests: selftest(kernel, defect, seed) runs a kernel with a planted defect and says what was seen.
#include "simt.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.cuh"
#include "lanes.cuh"

namespace selftest {
namespace {

// Buffers have exactly the size that is used, so that the address sanitizer sees the first byte beyond.
template <class T>
using Buffer = std::vector<T>;

Buffer<float> numbers(int n) {
  Buffer<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = float(i * 37 % 101 - 50);
  return x;
}

uint16_t bf16_of(int i) { return uint16_t(__float_as_uint(float(i)) >> 16); }

// How many values are wrong.
template <Defect kDefect>
int run_product() {
  const int rows = 50, columns = 2 * kTile, depth = 3 * kTile;
  const auto a = [](int i, int k) { return (i * 5 + k * 3) % 7 - 3; };
  const auto b = [](int j, int k) { return (j * 3 + k * 11) % 5 - 2; };
  Buffer<uint16_t> left(rows * depth), right(columns * depth);
  Buffer<float> c(rows * columns, -1.f);
  for (int i = 0; i < rows * depth; ++i) left[i] = bf16_of(a(i / depth, i % depth));
  for (int j = 0; j < columns * depth; ++j) right[j] = bf16_of(b(j / depth, j % depth));
  const size_t shared = kProductShared - (kDefect == Defect::short_shared_memory ? 16 : 0);
  simt::launch(product<kDefect>, dim3(columns / kTile), dim3(kProductThreads), shared,
               Product{left.data(), right.data(), c.data(), rows, columns, depth});
  int wrong = 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      int sum = 0;
      for (int k = 0; k < depth; ++k) sum += a(i, k) * b(j, k);
      wrong += c[i * columns + j] != float(sum);
    }
  }
  return wrong;
}

template <Defect kDefect>
int run_reduce() {
  const int blocks = 3, threads = 256;
  const Buffer<float> x = numbers(blocks * threads);
  Buffer<float> out(blocks);
  simt::launch(reduce<kDefect>, dim3(blocks), dim3(threads), 32 * sizeof(float), x.data(), out.data());
  int wrong = 0;
  for (int b = 0; b < blocks; ++b) {
    float sum = 0;
    for (int i = 0; i < threads; ++i) sum += x[b * threads + i];
    wrong += out[b] != sum;
  }
  return wrong;
}

template <Defect kDefect>
int run_copy() {
  const int n = 300;
  const Buffer<float> from = numbers(n);
  Buffer<float> to(n);
  simt::launch(copy<kDefect>, dim3(3), dim3(128), 0, from.data(), to.data(), n);
  return from != to;
}

int count_reversed(const Buffer<float>& from, const Buffer<float>& to, int group) {
  int wrong = 0;
  for (int i = 0; i < int(from.size()); ++i) wrong += to[i] != 2 * from[i / group * group + group - 1 - i % group];
  return wrong;
}

template <Defect kDefect>
int run_reverse() {
  const int n = 128;
  const Buffer<float> from = numbers(n);
  Buffer<float> to(n), scratch(n);
  simt::launch(reverse<kDefect>, dim3(1), dim3(n), 0, from.data(), to.data(), scratch.data());
  return count_reversed(from, to, n);
}

template <Defect kDefect>
int run_reverse_quads() {
  const int n = 64;
  const Buffer<float> from = numbers(n);
  Buffer<float> to(n);
  simt::launch(reverse_quads<kDefect>, dim3(1), dim3(n), n * sizeof(float), from.data(), to.data());
  return count_reversed(from, to, 4);
}

template <Defect kDefect>
int run_copy_async() {
  const int n = 64;
  Buffer<float4> from(n), to(n);
  for (int i = 0; i < n; ++i) from[i] = {float(i), float(-i), 1, 2};
  const Buffer<float4> before = from;
  simt::launch(copy_async<kDefect>, dim3(1), dim3(n), n * sizeof(float4), from.data(), to.data());
  return std::memcmp(before.data(), to.data(), n * sizeof(float4)) != 0;
}

template <Defect kDefect>
int run_break_rules() {
  const float* shelf = nullptr;
  simt::launch(break_rules<kDefect>, dim3(1), dim3(32), 512, &shelf);
  return 0;
}

template <void (*kernel)(int*)>
int run_lanes() {
  Buffer<int> wrong(32, 1000);
  simt::launch(kernel, dim3(1), dim3(32), 512, wrong.data());
  int sum = 0;
  for (const int count : wrong) sum += count;
  return sum;
}

int run_indices() {
  const dim3 grid(2, 3, 2), block(16, 16, 4);
  Buffer<int> to(12 * 1024, -1);
  simt::launch(indices, grid, block, 0, to.data());
  int wrong = 0;
  for (int i = 0; i < int(to.size()); ++i) wrong += to[i] != i;
  return wrong;
}

// What a product of 2 blocks, 4 warps and 3 stages counts.
int run_statistics() {
  run_product<Defect::none>();
  const simt::Stats& s = simt::stats();
  const uint64_t steps = 2 * 4 * 3 * (kTile / 16);
  return (s.launches != 1) + (s.mma != steps * 8) + (s.ldmatrix != steps * 5) + (s.barriers != 2 * 3 * 2);
}

int run_large_launch() {
  simt::launch(copy<Defect::none>, dim3(1), dim3(32), simt::options().max_smem + 1, nullptr, nullptr, 0);
  return 0;
}

struct Case {
  const char *kernel, *defect;
  int (*run)();
};

#define SELFTEST(kernel, defect) {#kernel, #defect, run_##kernel<Defect::defect>}
constexpr Case kCases[] = {
    SELFTEST(product, none),
    SELFTEST(product, missing_barrier),
    SELFTEST(product, missing_refill_barrier),
    SELFTEST(product, missing_wait),
    SELFTEST(product, wait_after_barrier),
    SELFTEST(product, missing_syncwarp),
    SELFTEST(product, no_swizzle),
    SELFTEST(product, swizzled_writes_only),
    SELFTEST(product, load_tail),
    SELFTEST(product, store_tail),
    SELFTEST(product, overlapping_blocks),
    SELFTEST(product, short_shared_memory),
    SELFTEST(reduce, none),
    SELFTEST(reduce, divergent_shuffle),
    SELFTEST(reduce, skipped_barrier),
    SELFTEST(reduce, early_exit),
    SELFTEST(reduce, missing_barrier),
    SELFTEST(reduce, uninitialised_read),
    SELFTEST(reduce, overlapping_blocks),
    SELFTEST(copy, none),
    SELFTEST(copy, store_tail),
    SELFTEST(reverse, none),
    SELFTEST(reverse, missing_barrier),
    SELFTEST(reverse_quads, none),
    SELFTEST(reverse_quads, missing_syncwarp),
    SELFTEST(reverse_quads, narrow_mask),
    SELFTEST(copy_async, none),
    SELFTEST(copy_async, read_before_wait),
    SELFTEST(copy_async, source_overwritten),
    SELFTEST(copy_async, unawaited_copy),
    SELFTEST(copy_async, misaligned_copy),
    SELFTEST(break_rules, misaligned_row),
    SELFTEST(break_rules, short_shared_memory),
    SELFTEST(break_rules, shared_overrun),
    SELFTEST(break_rules, other_stack),
    {"ldmatrix_lanes", "none", run_lanes<ldmatrix_lanes>},
    {"mma_lanes", "none", run_lanes<mma_lanes>},
    {"shuffle_lanes", "none", run_lanes<shuffle_lanes>},
    {"indices", "none", run_indices},
    {"statistics", "none", run_statistics},
    {"large_launch", "too_much_shared_memory", run_large_launch},
};
#undef SELFTEST

void run(const Case& c, unsigned seed) {
  simt::options().seed = seed;
  simt::reset_stats();
  std::printf("%s %s %u: ", c.kernel, c.defect, seed);
  std::fflush(stdout);  // the address sanitizer may end the process
  try {
    const int wrong = c.run();
    const uint64_t conflicts = simt::stats().ldmatrix_conflicts;
    if (wrong) std::printf("%d wrong values\n", wrong);
    if (!wrong && conflicts) std::printf("%lu bank conflicts\n", static_cast<unsigned long>(conflicts));
    if (!wrong && !conflicts) std::printf("ok\n");
  } catch (const simt::Error& error) {
    std::printf("%s\n", error.what());
  }
  std::fflush(stdout);
}

}  // namespace
}  // namespace selftest

// Runs the cases of these names, "*" being any. Returns how many there are.
extern "C" int selftest_run(const char* kernel, const char* defect, unsigned seed) {
  int count = 0;
  const auto matches = [](const char* pattern, const char* name) {
    return std::strcmp(pattern, "*") == 0 || std::strcmp(pattern, name) == 0;
  };
  for (const selftest::Case& c : selftest::kCases) {
    if (!matches(kernel, c.kernel) || !matches(defect, c.defect)) continue;
    selftest::run(c, seed);
    ++count;
  }
  return count;
}

// Arguments: triples of kernel, defect, seed.
int main(int count, char** arguments) {
  for (int i = 1; i + 2 < count; i += 3) {
    if (selftest_run(arguments[i], arguments[i + 1], unsigned(std::atoi(arguments[i + 2]))) == 0) return 2;
  }
  return 0;
}
