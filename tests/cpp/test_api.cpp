// The C++ API of csrc/nystrom.h: defaults, masks, errors, autograd.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>
#include <nystrom_ext/nystrom.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>

namespace {

using at::Tensor;
using nystrom_ext::attention;
using nystrom_ext::attention_varlen;
using nystrom_ext::AttentionOptions;

Tensor leaf(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, dtype).requires_grad_();
}

void expect_close(const Tensor& actual, const Tensor& expected, double tolerance = 1e-10) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  if (actual.numel() == 0) return;
  EXPECT_LE((actual.to(at::kDouble) - expected.to(at::kDouble)).abs().max().item<double>(), tolerance);
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

class Api : public testing::Test {
 protected:
  AttentionOptions options;
  void SetUp() override { at::manual_seed(0); }
};

TEST_F(Api, DefaultsAreThoseOfTheSchema) {
  const auto& schema = c10::Dispatcher::singleton().findSchemaOrThrow("nystrom_ext::attention", "").schema();
  const std::vector<std::pair<const char*, c10::IValue>> expected = {
      {"query_padding_mask", options.query_padding_mask},
      {"conv_weight", options.conv_weight},
      {"num_landmarks", options.num_landmarks},
      {"pinv_iterations", options.pinv_iterations},
      {"scale", options.scale},
      {"dropout_p", options.dropout_p},
      {"coefficient", options.coefficient},
      {"enable_gqa", options.enable_gqa},
      {"window", options.window},
      {"pinned", options.pinned},
  };
  ASSERT_EQ(schema.arguments().size(), expected.size() + 4);  // query, key, value, key_padding_mask
  for (const auto& [name, value] : expected) {
    const auto index = schema.argumentIndexWithName(name);
    ASSERT_TRUE(index.has_value()) << name;
    const c10::IValue& other = schema.arguments()[*index].default_value().value();
    EXPECT_TRUE(value.isNone() ? other.isNone() : value == other) << name;
  }
}

TEST_F(Api, ShortSequencesAreExact) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const Tensor q = at::randn({2, 3, 40, 8}, dtype), k = at::randn({2, 3, 50, 8}, dtype);
    const Tensor v = at::randn({2, 3, 50, 6}, dtype), out = attention(q, k, v);
    EXPECT_EQ(out.scalar_type(), dtype);
    const Tensor expected = at::scaled_dot_product_attention(q.to(at::kDouble), k.to(at::kDouble), v.to(at::kDouble));
    expect_close(out, expected, dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : 2e-2);
  }
}

// The definition for lengths that the number of landmarks divides.
Tensor composed(const Tensor& q, const Tensor& k, const Tensor& v, int64_t m) {
  const double s = 1 / std::sqrt(double(q.size(-1)));
  const auto means = [m](const Tensor& x) { return x.unflatten(2, {m, x.size(2) / m}).mean(3); };
  const Tensor qt = means(q), kt = means(k), a = at::softmax(s * qt.matmul(kt.mT()), -1), eye = at::eye(m, q.options());
  Tensor z = a.mT() / (a.sum(-1).amax(-1) * a.sum(-2).amax(-1)).unsqueeze(-1).unsqueeze(-1);
  for (int i = 0; i < 6; ++i) {
    const Tensor x = a.matmul(z);
    z = 0.25 * z.matmul(13 * eye - x.matmul(15 * eye - x.matmul(7 * eye - x)));
  }
  const Tensor u = at::softmax(s * qt.matmul(k.mT()), -1).matmul(v);
  return at::softmax(s * q.matmul(kt.mT()), -1).matmul(z.matmul(u));
}

TEST_F(Api, LongOnesFollowTheDefinitionForwardAndBackward) {
  options.num_landmarks = 8;
  const Tensor q = leaf({2, 3, 48, 8}), k = leaf({2, 3, 64, 8}), v = leaf({2, 3, 64, 5});
  const Tensor out = attention(q, k, v, std::nullopt, options), expected = composed(q, k, v, 8);
  expect_close(out, expected);
  const Tensor grad = at::randn_like(out);
  const auto actual_grads = torch::autograd::grad({out}, {q, k, v}, {grad});
  const auto expected_grads = torch::autograd::grad({expected}, {q, k, v}, {grad});
  for (size_t i = 0; i < 3; ++i) expect_close(actual_grads[i], expected_grads[i]);
}

TEST_F(Api, PaddingMasks) {
  options.num_landmarks = 8;
  const Tensor x = at::randn({1, 2, 40, 8}, at::kDouble), mask = at::arange(40).unsqueeze(0) >= 30;
  const Tensor expected = attention(x.narrow(2, 0, 30), x.narrow(2, 0, 30), x.narrow(2, 0, 30), std::nullopt, options);
  options.query_padding_mask = mask;
  const Tensor out = attention(x, x, x, mask, options);
  EXPECT_TRUE(out.narrow(2, 0, 30).equal(expected));
  EXPECT_FALSE(out.narrow(2, 30, 10).any().item<bool>());
}

TEST_F(Api, PackedSequences) {
  options.num_landmarks = 8;
  options.window = 2;
  const int64_t lengths[] = {40, 0, 3, 25};
  const Tensor x = leaf({68, 2, 8}), cu = at::tensor({0, 40, 40, 43, 68}, at::kInt);
  const Tensor out = attention_varlen(x, x, x, cu, cu, 40, 40, options), grad = at::randn_like(out);
  const Tensor gradient = torch::autograd::grad({out}, {x}, {grad})[0];
  int64_t first = 0;
  for (const int64_t n : lengths) {
    const Tensor one = x.detach().narrow(0, first, n).transpose(0, 1).unsqueeze(0).requires_grad_();
    const Tensor alone = attention(one, one, one, std::nullopt, options);
    EXPECT_TRUE(out.narrow(0, first, n).equal(alone[0].transpose(0, 1)));
    const Tensor own = grad.narrow(0, first, n).transpose(0, 1).unsqueeze(0);
    const Tensor expected = torch::autograd::grad({alone}, {one}, {own})[0];
    expect_close(gradient.narrow(0, first, n), expected[0].transpose(0, 1));  // sums of three, in either order
    first += n;
  }
  options.query_padding_mask = at::zeros({4, 40}, at::kBool);
  EXPECT_EQ(error_of([&] { attention_varlen(x, x, x, cu, cu, 40, 40, options); }).substr(0, 51),
            "nystrom_attention: packed sequences have no padding");
}

// A tensor that does not exist is no tensor, as in torch's own C++ functions.
TEST_F(Api, UndefinedTensorsAreNone) {
  options.num_landmarks = 8;
  const Tensor x = leaf({1, 2, 40, 8});
  const Tensor expected = attention(x, x, x, std::nullopt, options);
  options.query_padding_mask = Tensor();
  options.conv_weight = Tensor();
  EXPECT_TRUE(attention(x, x, x, Tensor(), options).equal(expected));
  attention(x, x, x, Tensor(), options).sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

TEST_F(Api, Errors) {
  const Tensor x = at::randn({2, 4, 20, 8}), fewer = at::randn({2, 2, 20, 8});
  const auto with = [&](const std::function<void(AttentionOptions&)>& change) {
    AttentionOptions changed;
    change(changed);
    return error_of([&] { attention(x, x, x, std::nullopt, changed); });
  };
  const auto starts = [](const std::string& message, const std::string& expected) {
    EXPECT_EQ(message.substr(0, expected.size()), expected);
  };
  starts(with([](auto& o) { o.num_landmarks = 0; }), "nystrom_attention: num_landmarks must be at least 1, got 0");
  starts(with([](auto& o) { o.pinv_iterations = -1; }), "nystrom_attention: pinv_iterations must not be negative");
  starts(with([](auto& o) { o.scale = HUGE_VAL; }), "nystrom_attention: scale must be finite, got inf");
  starts(with([](auto& o) { o.dropout_p = 1.5; }), "nystrom_attention: dropout_p must be between 0 and 1, got 1.5");
  starts(with([](auto& o) { o.coefficient = "local"; }), "nystrom_attention: coefficient must be \"per_head\" or");
  starts(with([](auto& o) { o.window = -1; }), "nystrom_attention: window must not be negative, got -1");
  starts(with([](auto& o) { o.pinned = -2; }), "nystrom_attention: pinned must not be negative, got -2");
  starts(with([](auto& o) { o.conv_weight = at::randn({3, 5}); }), "nystrom_attention: conv_weight must have shape");
  starts(with([](auto& o) { o.query_padding_mask = at::zeros({2, 20}); }),
         "nystrom_attention: query_padding_mask must");
  starts(error_of([&] { attention(x, fewer, fewer); }),
         "nystrom_attention: query and key must have the same number of");
  starts(error_of([&] { attention(x[0], x[0], x[0]); }), "nystrom_attention: query must have 4 dimensions");
  starts(error_of([&] { attention(x.to(at::kLong), x, x); }), "nystrom_attention: query, key and value must have one");
  starts(error_of([&] { attention(x, x, x, at::zeros({2, 21}, at::kBool)); }), "nystrom_attention: key_padding_mask");
}

TEST_F(Api, GroupedQueriesAndConvolution) {
  options.num_landmarks = 8;
  options.enable_gqa = true;
  const Tensor q = leaf({2, 4, 40, 8}), k = leaf({2, 2, 40, 8}), v = leaf({2, 2, 40, 8}), w = leaf({4, 3});
  const Tensor plain = attention(q, k, v, std::nullopt, options);
  options.conv_weight = w;
  const Tensor out = attention(q, k, v, std::nullopt, options), wide = v.repeat_interleave(2, 1);
  const Tensor columns = wide.permute({0, 3, 1, 2}).flatten(0, 1);  // (batch and feature, head, token)
  const Tensor convolved = at::conv1d(columns, w.unsqueeze(1), {}, 1, 1, 1, 4);
  const Tensor expected = plain + convolved.unflatten(0, {2, 8}).permute({0, 2, 3, 1});
  expect_close(out, expected);
  const auto actual_grads = torch::autograd::grad({out.sum()}, {q, k, v, w});
  const auto expected_grads = torch::autograd::grad({expected.sum()}, {q, k, v, w});
  for (size_t i = 0; i < 4; ++i) expect_close(actual_grads[i], expected_grads[i], 1e-9);
}

TEST_F(Api, GradientsOnlyWhereAskedFor) {
  options.num_landmarks = 8;
  const Tensor q = leaf({1, 2, 40, 8}), k = at::randn({1, 2, 40, 8}, at::kDouble);
  attention(q, k, k, std::nullopt, options).sum().backward();
  EXPECT_TRUE(q.grad().defined());
  EXPECT_FALSE(k.grad().defined());
  const at::NoGradGuard guard;
  EXPECT_FALSE(attention(q, k, k, std::nullopt, options).requires_grad());
}

TEST_F(Api, HigherDerivativesAskForPython) {
  const Tensor x = leaf({1, 1, 100, 8});
  const auto first = torch::autograd::grad({attention(x, x, x).sum()}, {x}, {}, true, true)[0];
  const auto error = error_of([&] { torch::autograd::grad({first.sum()}, {x}); });
  EXPECT_NE(error.find("need the Python package; import nystrom_ext"), std::string::npos) << error;
}

TEST_F(Api, DropoutFollowsTheSeed) {
  options.num_landmarks = 8;
  options.dropout_p = 0.4;
  const Tensor x = at::randn({1, 2, 40, 8});
  const auto call = [&](uint64_t seed) {
    at::manual_seed(seed);
    return attention(x, x, x, std::nullopt, options);
  };
  EXPECT_TRUE(call(1).equal(call(1)));
  EXPECT_FALSE(call(1).equal(call(2)));
}

TEST_F(Api, WindowOverEverythingIsExact) {
  options.num_landmarks = 8;
  options.window = 100;
  const Tensor x = at::randn({1, 2, 40, 8}, at::kDouble);
  expect_close(attention(x, x, x, std::nullopt, options), at::scaled_dot_product_attention(x, x, x));
}

TEST_F(Api, ThreadsDoNotChangeBits) {
  options.num_landmarks = 16;
  options.window = 4;
  const Tensor x = leaf({2, 4, 300, 16}, at::kFloat);
  std::vector<std::pair<Tensor, Tensor>> results;
  for (const int threads : {1, 2, 5}) {
    at::set_num_threads(threads);
    const Tensor out = attention(x, x, x, std::nullopt, options);
    results.emplace_back(out, torch::autograd::grad({out.sum()}, {x})[0]);
  }
  for (const auto& [out, grad] : results) {
    EXPECT_TRUE(out.equal(results[0].first));
    EXPECT_TRUE(grad.equal(results[0].second));
  }
}

}  // namespace
