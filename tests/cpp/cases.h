// The calls that the tests of the kernels share, and how far results may lie apart.
#pragma once

#include <gtest/gtest.h>

#include "matrix.h"
#include "schedule.h"

namespace nystrom_test {

inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

inline const std::vector<Case> kCases = {
    {.name = "plain"},
    {.name = "odd_sizes",
     .heads = 3,
     .kv_heads = 3,
     .queries = 101,
     .keys = 101,
     .head_dim = 5,
     .value_dim = 17,
     .landmarks = 20},
    {.name = "aligned_rows", .queries = 205, .keys = 205, .head_dim = 16, .value_dim = 32, .landmarks = 16},
    {.name = "cross", .queries = 33, .keys = 90, .head_dim = 12, .value_dim = 20},
    {.name = "grouped_convolution",
     .heads = 4,
     .queries = 50,
     .keys = 50,
     .value_dim = 6,
     .taps = 4,
     .mask = Mask::holes},
    {.name = "tail", .batch = 3, .taps = 3, .mask = Mask::tail},
    {.name = "one_sample_empty", .taps = 5, .mask = Mask::all},
    {.name = "strided", .queries = 45, .keys = 45, .head_dim = 16, .value_dim = 16, .taps = 3, .strided = true},
    {.name = "exact_keys", .queries = 60, .keys = 30, .landmarks = 32},
    {.name = "exact_queries", .queries = 7, .keys = 60, .value_dim = 12},
    {.name = "global", .batch = 3, .heads = 4, .global_coefficient = true, .mask = Mask::tail},
    {.name = "chunks",
     .batch = 1,
     .heads = 2,
     .kv_heads = 1,
     .queries = 2100,
     .keys = 2100,
     .head_dim = 4,
     .value_dim = 4,
     .taps = 2},
    {.name = "window", .queries = 120, .keys = 120, .head_dim = 10, .window = 5},
    {.name = "window_pinned",
     .heads = 4,
     .queries = 110,
     .keys = 110,
     .taps = 3,
     .window = 9,
     .pinned = 7,
     .mask = Mask::holes},
    {.name = "pinned", .queries = 110, .keys = 110, .head_dim = 16, .value_dim = 16, .pinned = 30},
    {.name = "window_over_everything", .window = 1000, .pinned = 1, .global_coefficient = true, .mask = Mask::tail},
    {.name = "window_chunks",
     .batch = 1,
     .heads = 1,
     .kv_heads = 1,
     .queries = 1040,
     .keys = 1040,
     .head_dim = 4,
     .value_dim = 4,
     .window = 16,
     .pinned = 1},
};

// Those of kCases with dropout, which the reference does not have.
inline const std::vector<Case> kDropoutCases = [] {
  std::vector<Case> all;
  for (Case c : kCases) {
    c.name += "_dropout";
    c.dropout_p = 0.3;
    const bool chosen = c.name.find("grouped") == 0 || c.name.find("exact") == 0 || c.name.find("window_pinned") == 0;
    if (chosen) all.push_back(c);
  }
  return all;
}();

// Bars for the relative root mean square of the difference: of what is kept in the accumulation type, and of what is
// rounded to the dtype.
inline double accumulation_bar(Dtype dtype) { return dtype == Dtype::float64 ? 1e-11 : 2e-5; }
inline double rounding_bar(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? 4e-3 : dtype == Dtype::float16 ? 6e-4 : accumulation_bar(dtype);
}

// Relative root mean square of the difference; of the values themselves where zeros are expected. NaN if any is.
inline double distance(const std::vector<double>& actual, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / (norm > 0 ? norm : 1));
}

inline void expect_close(const std::string& what, const std::vector<double>& actual,
                         const std::vector<double>& expected, double bar) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  EXPECT_LE(distance(actual, expected), bar) << what;
}

}  // namespace nystrom_test
