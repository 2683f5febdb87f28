// Whole problems, forward and backward: instruction sets beside each other, threads, and gradients by differences.
#include <random>

#include "cases.h"

namespace nystrom_test {
namespace {

struct Results {
  std::vector<double> out, dquery, dkey, dvalue, dconv;
};

// Name, member.
constexpr std::pair<const char*, std::vector<double> Results::*> kMembers[] = {{"O", &Results::out},
                                                                               {"dQ", &Results::dquery},
                                                                               {"dK", &Results::dkey},
                                                                               {"dV", &Results::dvalue},
                                                                               {"dconv", &Results::dconv}};

Results run(const InstructionSet& set, Call& call, int threads = 1) {
  Schedule schedule(set, call, threads);
  schedule.forward();
  schedule.backward();
  const Backward& g = call.backward;
  Results results{call.values(call.forward.out, g.heads, g.queries.length, g.value_dim), {}, {}, {}, {}};
  if (g.wanted.query) results.dquery = call.values(g.dquery, g.heads, g.queries.length, g.head_dim);
  if (g.wanted.key) results.dkey = call.values(g.dkey, g.kv_heads, g.keys.length, g.head_dim);
  if (g.wanted.value) results.dvalue = call.values(g.dvalue, g.kv_heads, g.keys.length, g.value_dim);
  for (int64_t i = 0; g.wanted.conv && i < g.heads * g.taps; ++i) results.dconv.push_back(call.read(g.dconv, i));
  return results;
}

class Problems : public testing::TestWithParam<Case> {
 protected:
  Results run(const InstructionSet& set, Dtype dtype, int threads) {
    Call call(GetParam(), dtype);
    return nystrom_test::run(set, call, threads);
  }
};

// Within rounding: instruction sets sum in different orders, so a 16-bit result may fall on the other side.
TEST_P(Problems, InstructionSetsAgree) {
  if (instruction_sets().size() == 1) GTEST_SKIP() << "this processor or build has one instruction set";
  for (const Dtype dtype : kDtypes) {
    const Results expected = run(instruction_sets()[0], dtype, 1);
    for (size_t i = 1; i < instruction_sets().size(); ++i) {
      SCOPED_TRACE(std::string(name_of(dtype)) + ", " + instruction_sets()[i].name);
      const Results actual = run(instruction_sets()[i], dtype, 1);
      for (const auto& [name, member] : kMembers) {
        const bool rounded = member != &Results::dconv;
        const double bar = rounded ? rounding_bar(dtype) : accumulation_bar(dtype);
        expect_close(name, actual.*member, expected.*member, bar / 2);
      }
    }
  }
}

// The same bits however many threads take the tasks, and in whatever order.
TEST_P(Problems, Threads) {
  for (const Dtype dtype : kDtypes) {
    for (const InstructionSet& set : instruction_sets()) {
      SCOPED_TRACE(std::string(name_of(dtype)) + ", " + set.name);
      const Results expected = run(set, dtype, 1), actual = run(set, dtype, 4);
      for (const auto& [name, member] : kMembers) EXPECT_EQ(actual.*member, expected.*member) << name;
    }
  }
}

// The same bits whatever else is asked for, and what serves none of them is not there. One dtype whose rows are read in
// place, one whose rows are converted.
TEST_P(Problems, GradientsByThemselves) {
  for (const Dtype dtype : {Dtype::float64, Dtype::bfloat16}) {
    for (const InstructionSet& set : instruction_sets()) {
      const Results all = run(set, dtype, 1);
      for (int bits = 1; bits < 16; ++bits) {
        const Wanted wanted{bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8)};
        if (wanted.conv && GetParam().taps == 0) continue;
        SCOPED_TRACE(std::string(name_of(dtype)) + ", " + set.name + ", wanted " + std::to_string(bits));
        Call call(GetParam(), dtype);
        call.want(wanted);
        const Results some = nystrom_test::run(set, call);
        if (wanted.query) EXPECT_EQ(some.dquery, all.dquery);
        if (wanted.key) EXPECT_EQ(some.dkey, all.dkey);
        if (wanted.value) EXPECT_EQ(some.dvalue, all.dvalue);
        if (wanted.conv) EXPECT_EQ(some.dconv, all.dconv);
      }
    }
  }
}

// <dO, O> along a random direction of one input.
class Directional {
 public:
  Directional(const InstructionSet& set, Call& call, const Operand& x, int64_t heads, int64_t tokens, int64_t features)
      : set_(set), call_(call), x_(x), heads_(heads), tokens_(tokens), features_(features) {
    std::mt19937 engine(7);
    base_ = call.values(x, heads, tokens, features);
    for (size_t i = 0; i < base_.size(); ++i) direction_.push_back(std::normal_distribution<double>()(engine));
  }

  double numeric() {
    constexpr double step = 1e-5;
    const double difference = at(step) - at(-step);
    move(0);
    return difference / (2 * step);
  }

  double exact(const std::vector<double>& gradient) const {
    double total = 0;
    for (size_t i = 0; i < gradient.size(); ++i) total += gradient[i] * direction_[i];
    return total;
  }

 private:
  const InstructionSet& set_;
  Call& call_;
  const Operand& x_;
  int64_t heads_, tokens_, features_;
  std::vector<double> base_, direction_;

  // Padding is NaN and stays it.
  void move(double step) {
    size_t i = 0;
    for (int64_t b = 0; b < int64_t(base_.size()) / (heads_ * tokens_ * features_); ++b) {
      for (int64_t h = 0; h < heads_; ++h) {
        for (int64_t t = 0; t < tokens_; ++t) {
          for (int64_t x = 0; x < features_; ++x, ++i) call_.write(x_, b, h, t, x, base_[i] + step * direction_[i]);
        }
      }
    }
  }

  double at(double step) {
    move(step);
    Schedule(set_, call_).forward();
    const Backward& g = call_.backward;
    const auto out = call_.values(call_.forward.out, g.heads, g.queries.length, g.value_dim);
    const auto dout = call_.values(g.out, g.heads, g.queries.length, g.value_dim);
    double total = 0;
    for (size_t i = 0; i < out.size(); ++i) total += out[i] == 0 ? 0 : out[i] * dout[i];  // dO is NaN at padding
    return total;
  }
};

TEST_P(Problems, GradientsAreThoseOfTheForward) {
  for (const InstructionSet& set : instruction_sets()) {
    SCOPED_TRACE(set.name);
    Call call(GetParam(), Dtype::float64);
    const Results results = nystrom_test::run(set, call);
    const Backward& g = call.backward;
    const auto check = [&](const char* name, Directional x, const std::vector<double>& gradient) {
      const double numeric = x.numeric(), exact = x.exact(gradient);
      EXPECT_NEAR(exact, numeric, 1e-6 * std::fmax(1, std::abs(numeric))) << name;
    };
    check("dQ", {set, call, g.query, g.heads, g.queries.length, g.head_dim}, results.dquery);
    check("dK", {set, call, g.key, g.kv_heads, g.keys.length, g.head_dim}, results.dkey);
    check("dV", {set, call, g.value, g.kv_heads, g.keys.length, g.value_dim}, results.dvalue);
  }
}

const auto name_of_case = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(, Problems, testing::ValuesIn(kCases), name_of_case);
INSTANTIATE_TEST_SUITE_P(Random, Problems, testing::ValuesIn(kDropoutCases), name_of_case);

}  // namespace
}  // namespace nystrom_test
