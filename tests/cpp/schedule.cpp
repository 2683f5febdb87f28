#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace nystrom_ext::cpu {

extern const Kernels kernels_default[4];
#ifdef NYSTROM_X86_64
extern const Kernels kernels_avx2[4], kernels_avx512[4];
#endif

}  // namespace nystrom_ext::cpu

namespace nystrom_test {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> all = [] {
    std::vector<InstructionSet> found = {{"default", cpu::kernels_default}};
#ifdef NYSTROM_X86_64
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) found.push_back({"avx2", cpu::kernels_avx2});
    if (avx512) found.push_back({"avx512", cpu::kernels_avx512});
#endif
    return found;
  }();
  return all;
}

Schedule::Schedule(const InstructionSet& set, Call& call, int threads)
    : kernels_(set.kernels[int(call.dtype)]), call_(call), threads_(threads) {}

template <class F>
void Schedule::parallel(int64_t tasks, const F& run) const {
  if (threads_ == 1) return run(0, tasks);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> team;
  for (int i = 0; i < threads_; ++i) {
    team.emplace_back([&] {
      // Relaxed, so that this counter does not order what the tasks do to memory.
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task, task + 1);
    });
  }
  for (std::thread& thread : team) thread.join();
}

// Chunks of a head beyond its first one.
int64_t Schedule::later(const Slots& slots) const { return call_.forward.heads * (slots.all() - call_.forward.batch); }

void Schedule::landmarks() {
  const Forward& f = call_.forward;
  parallel(f.problems() * f.segments(), [&](int64_t a, int64_t b) { kernels_.landmarks(f, a, b); });
}

void Schedule::key_pass() {
  const Forward& f = call_.forward;
  const Slots slots = cpu::chunks(f.keys, f);
  const int64_t tasks = f.heads * slots.all(), rows = f.queries.landmarks;
  const cpu::Partials partials{call_.buffer(later(slots) * rows * f.value_width()), call_.buffer(tasks * padded(rows)),
                               call_.buffer(tasks * padded(rows))};
  parallel(tasks, [&](int64_t a, int64_t b) { kernels_.key_pass(f, partials, a, b); });
  parallel(f.problems(), [&](int64_t a, int64_t b) { kernels_.key_pass_merge(f, partials, a, b); });
}

std::pair<double, int64_t> Schedule::global_coefficient() const {
  const Forward& f = call_.forward;
  std::vector<double> c(size_t(f.problems()), -1);
  parallel(f.problems(), [&](int64_t a, int64_t b) { kernels_.coefficient(f, c.data(), a, b); });
  const auto top = std::max_element(c.begin(), c.end());
  return {*top, top - c.begin()};
}

void Schedule::core() {
  const Forward& f = call_.forward;
  const double global = f.global_coefficient ? global_coefficient().first : 0;
  const double* c = f.global_coefficient ? &global : nullptr;
  parallel(f.problems(), [&](int64_t a, int64_t b) { kernels_.core(f, c, a, b); });
}

void Schedule::query_pass() {
  const Forward& f = call_.forward;
  const int64_t tasks = f.heads * cpu::chunks(f.queries, f).all();
  parallel(tasks, [&](int64_t a, int64_t b) { kernels_.query_pass(f, a, b); });
}

void Schedule::query_pass_backward() {
  const Backward& g = call_.backward;
  const Slots slots = cpu::chunks(g.queries, g);
  const int64_t tasks = g.heads * slots.all(), parts = later(slots), rows = g.columns();
  const cpu::Partials partials{call_.buffer(parts * rows * g.value_width()),
                               call_.buffer(g.wanted.key ? parts * rows * g.head_width() : 0),
                               call_.buffer(g.extended() && g.wanted.scores() ? parts * g.queries.landmarks : 0)};
  parallel(tasks, [&](int64_t a, int64_t b) { kernels_.query_pass_backward(g, partials, a, b); });
  parallel(g.problems(), [&](int64_t a, int64_t b) { kernels_.query_pass_backward_merge(g, partials, a, b); });
}

void Schedule::core_backward() {
  const Backward& g = call_.backward;
  if (!g.global_coefficient) {
    return parallel(g.problems(), [&](int64_t a, int64_t b) { kernels_.core_backward(g, nullptr, nullptr, a, b); });
  }
  const auto [c, problem] = global_coefficient();
  std::vector<double> dc(size_t(g.problems()));
  parallel(g.problems(), [&, &c = c](int64_t a, int64_t b) { kernels_.core_backward(g, &c, dc.data(), a, b); });
  double total = 0;
  for (const double x : dc) total += x;
  if (c > 0 && g.wanted.scores()) kernels_.coefficient_backward(g, problem, total);
}

void Schedule::key_pass_backward() {
  const Backward& g = call_.backward;
  const Slots slots = cpu::chunks(g.keys, g);
  const cpu::Partials partials{call_.buffer(g.wanted.query ? later(slots) * g.queries.landmarks * g.head_width() : 0),
                               call_.buffer(g.wanted.conv ? g.heads * slots.all() * g.taps : 0), nullptr};
  parallel(g.kv_heads * slots.all(), [&](int64_t a, int64_t b) { kernels_.key_pass_backward(g, partials, a, b); });
  parallel(g.problems(), [&](int64_t a, int64_t b) { kernels_.key_pass_backward_merge(g, partials, a, b); });
}

void Schedule::landmarks_backward() {
  const Backward& g = call_.backward;
  parallel(g.problems() * g.queries.landmarks, [&](int64_t a, int64_t b) { kernels_.landmarks_backward(g, a, b); });
}

void Schedule::forward() {
  landmarks();
  key_pass();
  core();
  query_pass();
}

void Schedule::backward() {
  const Wanted& wanted = call_.backward.wanted;
  if (wanted.attention()) {
    query_pass_backward();
    core_backward();
  }
  key_pass_backward();
  if (wanted.query) landmarks_backward();
}

}  // namespace nystrom_test
