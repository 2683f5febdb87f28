// The CPU backend: each stage allocates its partial sums and shares its tasks out to the threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "backend.h"

namespace nystrom_ext {
namespace {

using cpu::kernels;
using cpu::Partials;

// A thread that is free takes half of an equal share of what is left: tasks differ, those of padding are empty, and so
// do processors. What a task computes does not depend on who runs it.
template <class F>
void parallel(int64_t tasks, const F& run) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next; begin < tasks; begin = next) {
      const int64_t end = begin + divide_up(tasks - begin, 2 * threads);
      if (next.compare_exchange_weak(begin, end)) run(begin, end);
    }
  });
}

at::Tensor buffer(const Problem& p, int64_t elements) {
  return at::empty({elements}, p.dtype == Dtype::float64 ? at::kDouble : at::kFloat);
}

// count, offsets and, behind a mask, index of one side.
int64_t* plan_side(Tokens& t, const Problem& p, int64_t* memory) {
  int64_t* count = memory;
  int64_t* offsets = count + p.batch;
  int64_t* index = offsets + p.batch * (t.landmarks + 1);
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t n = t.first ? t.first[b + 1] - t.first[b] : t.length;
    if (t.ignored) {
      n = 0;
      for (int64_t i = 0; i < t.length; ++i) {  // without a branch, which holes would have mispredicted
        index[b * t.length + n] = i;
        n += !t.ignored[b * t.length + i];
      }
    }
    count[b] = n;
    const int64_t segments = std::min(n, t.landmarks);
    int64_t* boundary = offsets + b * (t.landmarks + 1);
    for (int64_t j = 0; j <= segments; ++j) boundary[j] = segments == 0 ? 0 : j * n / segments;
  }
  t.count = count;
  t.offsets = offsets;
  t.index = t.ignored ? index : nullptr;
  return t.ignored ? index + p.batch * t.length : index;
}

at::Tensor plan(Problem& p) {
  const bool same =
      p.queries.ignored == p.keys.ignored && p.queries.first == p.keys.first && p.queries.length == p.keys.length;
  const auto size = [&](const Tokens& t) { return p.batch * (1 + t.landmarks + 1 + (t.ignored ? t.length : 0)); };
  at::Tensor memory = at::empty({size(p.queries) + (same ? 0 : size(p.keys))}, at::kLong);
  int64_t* rest = plan_side(p.queries, p, memory.mutable_data_ptr<int64_t>());
  if (same) {
    p.keys = p.queries;
  } else {
    plan_side(p.keys, p, rest);
  }
  return memory;
}

void landmarks(const Forward& f) {
  parallel(f.problems() * f.segments(), [&](int64_t a, int64_t b) { kernels(f.dtype).landmarks(f, a, b); });
}

// Chunks of a head beyond its first one.
int64_t later(const Problem& p, const Slots& slots) { return p.heads * (slots.all() - p.batch); }

void key_pass(const Forward& f) {
  const auto slots = cpu::chunks(f.keys, f);
  const int64_t tasks = f.heads * slots.all(), rows = f.queries.landmarks;
  const at::Tensor u = buffer(f, later(f, slots) * rows * f.value_width());
  const at::Tensor maxima = buffer(f, tasks * padded(rows)), sums = buffer(f, tasks * padded(rows));
  const Partials partials{u.data_ptr(), maxima.data_ptr(), sums.data_ptr()};
  parallel(tasks, [&](int64_t a, int64_t b) { kernels(f.dtype).key_pass(f, partials, a, b); });
  parallel(f.problems(), [&](int64_t a, int64_t b) { kernels(f.dtype).key_pass_merge(f, partials, a, b); });
}

// Option "global": the largest coefficient of the batch, and the problem that attains it. NaN counts as the largest.
struct GlobalCoefficient {
  double value = 0;
  int64_t problem = 0;

  explicit GlobalCoefficient(const Forward& f) {
    std::vector<double> c(size_t(f.problems()));
    parallel(f.problems(), [&](int64_t a, int64_t b) { kernels(f.dtype).coefficient(f, c.data(), a, b); });
    const auto top = std::max_element(c.begin(), c.end(), [](double a, double b) { return !(b <= a) && a == a; });
    if (top == c.end()) return;
    value = *top;
    problem = top - c.begin();
  }
};

void core(const Forward& f) {
  std::optional<GlobalCoefficient> global;
  if (f.global_coefficient) global.emplace(f);
  const double* c = global ? &global->value : nullptr;
  parallel(f.problems(), [&](int64_t a, int64_t b) { kernels(f.dtype).core(f, c, a, b); });
}

void query_pass(const Forward& f) {
  const int64_t tasks = f.heads * cpu::chunks(f.queries, f).all();
  parallel(tasks, [&](int64_t a, int64_t b) { kernels(f.dtype).query_pass(f, a, b); });
}

void query_pass_backward(const Backward& g) {
  const auto slots = cpu::chunks(g.queries, g);
  const int64_t tasks = g.heads * slots.all(), parts = later(g, slots), rows = g.columns();
  const at::Tensor dw = buffer(g, parts * rows * g.value_width());
  const at::Tensor dkt = buffer(g, g.wanted.key ? parts * rows * g.head_width() : 0);
  const at::Tensor dmissed = buffer(g, g.extended() && g.wanted.scores() ? parts * g.queries.landmarks : 0);
  const Partials partials{dw.data_ptr(), dkt.data_ptr(), dmissed.data_ptr()};
  parallel(tasks, [&](int64_t a, int64_t b) { kernels(g.dtype).query_pass_backward(g, partials, a, b); });
  parallel(g.problems(), [&](int64_t a, int64_t b) { kernels(g.dtype).query_pass_backward_merge(g, partials, a, b); });
}

void core_backward(const Backward& g) {
  if (!g.global_coefficient) {
    parallel(g.problems(), [&](int64_t a, int64_t b) { kernels(g.dtype).core_backward(g, nullptr, nullptr, a, b); });
    return;
  }
  const GlobalCoefficient global(g);
  std::vector<double> dc(size_t(g.problems()));
  parallel(g.problems(),
           [&](int64_t a, int64_t b) { kernels(g.dtype).core_backward(g, &global.value, dc.data(), a, b); });
  double total = 0;
  for (const double x : dc) total += x;
  if (global.value > 0 && g.wanted.scores()) kernels(g.dtype).coefficient_backward(g, global.problem, total);
}

void key_pass_backward(const Backward& g) {
  const auto slots = cpu::chunks(g.keys, g);
  const int64_t size = g.wanted.query ? g.queries.landmarks * g.head_width() : 0;
  const at::Tensor dqt = buffer(g, later(g, slots) * size);
  const at::Tensor dconv = buffer(g, g.wanted.conv ? g.heads * slots.all() * g.taps : 0);
  const Partials partials{dqt.data_ptr(), dconv.data_ptr()};
  parallel(g.kv_heads * slots.all(),
           [&](int64_t a, int64_t b) { kernels(g.dtype).key_pass_backward(g, partials, a, b); });
  parallel(g.problems(), [&](int64_t a, int64_t b) { kernels(g.dtype).key_pass_backward_merge(g, partials, a, b); });
}

void landmarks_backward(const Backward& g) {
  const int64_t tasks = g.problems() * g.queries.landmarks;
  parallel(tasks, [&](int64_t a, int64_t b) { kernels(g.dtype).landmarks_backward(g, a, b); });
}

// Under its name in torch.profiler.
template <class P>
void stage(const char* name, void (*run)(const P&), const P& p) {
  RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>{});
  run(p);
}

void forward(Forward& f) {
  const at::Tensor tokens = plan(f);
  stage("nystrom_ext::landmarks", landmarks, f);
  stage("nystrom_ext::key_pass", key_pass, f);
  stage("nystrom_ext::core", core, f);
  stage("nystrom_ext::query_pass", query_pass, f);
}

void backward(Backward& g) {
  const at::Tensor tokens = plan(g);
  const Wanted& wanted = g.wanted;
  const int64_t rows = g.window > 0 ? g.heads * g.queries.all(g.batch) : 0;
  const at::Tensor lse1 = buffer(g, wanted.tokens() ? rows : 0), delta1 = buffer(g, wanted.key ? rows : 0);
  g.lse1 = lse1.data_ptr();
  g.delta1 = delta1.data_ptr();
  if (wanted.attention()) {
    stage("nystrom_ext::query_pass_backward", query_pass_backward, g);
    stage("nystrom_ext::core_backward", core_backward, g);
  }
  stage("nystrom_ext::key_pass_backward", key_pass_backward, g);
  if (wanted.query) stage("nystrom_ext::landmarks_backward", landmarks_backward, g);
}

const Backend cpu_backend{nullptr, forward, backward};
const bool registered = (register_backend(at::kCPU, cpu_backend), true);

}  // namespace

TORCH_LIBRARY_IMPL(nystrom_ext, CompositeImplicitAutograd, m) {
  m.impl("_cpu_capability", [] { return std::string(cpu::capability()); });
}

}  // namespace nystrom_ext
