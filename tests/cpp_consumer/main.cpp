// A C++ program without Python, and all that it needs to know: exits with 0 if everything is as nystrom.h promises.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <nystrom_ext/nystrom.h>

#include <cstdio>
#include <string>

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  std::printf("%s: %s\n", holds ? "ok" : "WRONG", what);
  failures += !holds;
}

bool same(const at::Tensor& a, const at::Tensor& b) { return at::allclose(a, b, 1e-4, 1e-5); }

}  // namespace

int main() {
  at::manual_seed(0);
  const at::Tensor x = at::randn({2, 3, 50, 8}).requires_grad_(), y = x.detach().clone().requires_grad_();
  const at::Tensor grad = at::randn_like(x);
  nystrom_ext::AttentionOptions options;

  const at::Tensor out = nystrom_ext::attention(x, x, x);  // 64 landmarks for 50 tokens: exact attention
  const at::Tensor expected = at::scaled_dot_product_attention(y, y, y);
  out.backward(grad);
  expected.backward(grad);
  expect(same(out, expected), "short sequences are exact");
  expect(same(x.grad(), y.grad()), "and so are their gradients");

  options.num_landmarks = 8;
  x.mutable_grad().reset();
  const at::Tensor approximate = nystrom_ext::attention(x, x, x, std::nullopt, options);
  approximate.backward(grad);
  expect(at::isfinite(approximate).all().item<bool>() && !same(approximate, expected), "longer ones are approximate");
  expect(at::isfinite(x.grad()).all().item<bool>() && !same(x.grad(), y.grad()), "and have gradients of their own");

  std::string message;
  try {
    options.num_landmarks = 0;
    nystrom_ext::attention(x, x, x, std::nullopt, options);
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  }
  expect(message.rfind("nystrom_attention: num_landmarks must be at least 1, got 0", 0) == 0, "errors say what to do");
  expect(dlsym(RTLD_DEFAULT, "Py_Initialize") == nullptr, "no Python in the process");
  return failures == 0 ? 0 : 1;
}
