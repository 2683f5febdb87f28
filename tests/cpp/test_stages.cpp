// Each stage by itself: what the stages before it would have left is written from the reference, so that an error shows
// in the stage that makes it.
#include <functional>

#include "cases.h"
#include "reference.h"

namespace nystrom_test {
namespace {

// An m-sized buffer: `rows` rows per problem, each padded to `width`.
struct Buffer {
  void* data;
  int64_t rows, width;
};

using Of = std::function<const Matrix&(const Reference&)>;

// The buffers of one call, and a schedule that runs one of its stages.
struct Stage {
  Call call;
  const std::vector<Reference>& expected;
  Schedule schedule;
  const Backward& problem;
  Buffer qt, kt, u, lse, w, missed, dqt, dkt, du, dw, delta, dmissed, lse1, delta1;

  Stage(const InstructionSet& set, const Case& c, Dtype dtype, const std::vector<Reference>& expected)
      : call(c, dtype), expected(expected), schedule(set, call), problem(call.backward) {
    const Backward& g = problem;
    const int64_t m = g.queries.landmarks, columns = g.columns(), d = g.head_width(), e = g.value_width();
    qt = {g.qt, m, d}, kt = {g.kt, columns, d}, u = {g.u, m, e}, lse = {g.lse, m, 1}, w = {g.w, columns, e};
    missed = {g.missed, m, 1}, dqt = {g.dqt, m, d}, dkt = {g.dkt, columns, d}, du = {g.du, m, e};
    dw = {g.dw, columns, e}, delta = {g.delta, m, 1}, dmissed = {g.dmissed, m, 1};
    lse1 = {g.lse1, g.queries.length, 1}, delta1 = {g.delta1, g.queries.length, 1};
  }

  template <class F>
  void for_each(const F& f) const {
    for (size_t n = 0; n < expected.size(); ++n) f(int64_t(n), expected[n]);
  }

  void put(const Buffer& buffer, const Of& of) {
    for_each([&](int64_t n, const Reference& r) {
      const Matrix& x = of(r);
      for (int64_t i = 0; i < x.rows; ++i) {
        for (int64_t j = 0; j < buffer.width; ++j) {
          call.write(buffer.data, (n * buffer.rows + i) * buffer.width + j, j < x.columns ? x(i, j) : 0);
        }
      }
    });
  }

  // The rows that the reference has, with the zeros up to the width.
  void check(const char* what, const Buffer& buffer, const Of& of, double bar_factor = 1) {
    for_each([&](int64_t n, const Reference& r) {
      const Matrix& x = of(r);
      std::vector<double> actual, wanted;
      for (int64_t i = 0; i < x.rows; ++i) {
        for (int64_t j = 0; j < buffer.width; ++j) {
          actual.push_back(call.read(buffer.data, (n * buffer.rows + i) * buffer.width + j));
          wanted.push_back(j < x.columns ? x(i, j) : 0);
        }
      }
      expect_close(what, actual, wanted, bar_factor * accumulation_bar(call.dtype));
    });
  }

  // A gradient or the output: the sum over the query heads of each of its heads, and zeros at padding.
  void check(const char* what, const Operand& x, int64_t heads, bool queries, const Of& of, double bar_factor = 1) {
    const Problem& p = call.forward;
    const int64_t length = queries ? p.queries.length : p.keys.length, group = p.heads / heads;
    const int64_t columns = of(expected[0]).columns;
    std::vector<double> wanted(size_t(p.batch * heads * length * columns));
    for_each([&](int64_t, const Reference& r) {
      const Matrix& rows = of(r);
      const std::vector<int64_t>& positions = queries ? r.positions : r.keys;
      for (size_t i = 0; i < positions.size(); ++i) {
        const int64_t row = (r.b * heads + r.h / group) * length + positions[i];
        for (int64_t j = 0; j < columns; ++j) wanted[size_t(row * columns + j)] += rows(int64_t(i), j);
      }
    });
    expect_close(what, call.values(x, heads, length, columns), wanted, bar_factor * rounding_bar(call.dtype));
  }

  void check_convolution() {
    const Backward& g = problem;
    std::vector<double> actual, wanted(size_t(g.heads * g.taps));
    for_each([&](int64_t, const Reference& r) {
      for (int64_t t = 0; t < g.taps; ++t) wanted[size_t(r.h * g.taps + t)] += r.dconv(0, t);
    });
    for (int64_t i = 0; i < g.heads * g.taps; ++i) actual.push_back(call.read(g.dconv, i));
    expect_close("dconv", actual, wanted, accumulation_bar(call.dtype));
  }

  void put_dquery(const Of& of) {
    for_each([&](int64_t, const Reference& r) {
      for (int64_t i = 0; i < of(r).rows; ++i) {
        for (int64_t x = 0; x < of(r).columns; ++x) {
          call.write(problem.dquery, r.b, r.h, r.positions[i], x, of(r)(i, x));
        }
      }
    });
  }
};

class Stages : public testing::TestWithParam<Case> {
 protected:
  // Every dtype on every instruction set.
  void run(void (*test)(Stage&)) {
    for (const Dtype dtype : kDtypes) {
      const std::vector<Reference> expected = reference(Call(GetParam(), dtype));
      for (const InstructionSet& set : instruction_sets()) {
        SCOPED_TRACE(std::string(name_of(dtype)) + ", " + set.name);
        Stage stage(set, GetParam(), dtype, expected);
        test(stage);
      }
    }
  }
};

#define OF(member) [](const Reference& r) -> const Matrix& { return r.member; }

TEST_P(Stages, Landmarks) {
  run([](Stage& s) {
    s.schedule.landmarks();
    s.check("Qt", s.qt, OF(qt));
    s.check("Kt", s.kt, OF(kt));
  });
}

TEST_P(Stages, KeyPass) {
  run([](Stage& s) {
    s.put(s.qt, OF(qt));
    s.schedule.key_pass();
    s.check("U", s.u, OF(u));
    s.check("LSE3", s.lse, OF(lse));
  });
}

void put_what_the_core_needs(Stage& s) {
  s.put(s.qt, OF(qt));
  s.put(s.kt, OF(kt));
  s.put(s.u, OF(u));
  s.put(s.lse, OF(lse));
}

TEST_P(Stages, Core) {
  run([](Stage& s) {
    put_what_the_core_needs(s);
    s.schedule.core();
    s.check("W", s.w, OF(w));
    if (s.problem.extended()) s.check("missed", s.missed, OF(missed), 10);  // a small difference of two logarithms
  });
}

void put_what_queries_need(Stage& s) {
  s.put(s.kt, OF(kt));
  s.put(s.u, OF(u));
  s.put(s.w, OF(w));
  if (s.problem.extended()) s.put(s.missed, OF(missed));
}

TEST_P(Stages, QueryPass) {
  run([](Stage& s) {
    put_what_queries_need(s);
    s.schedule.query_pass();
    s.check("O", s.call.forward.out, s.problem.heads, true, OF(out));
  });
}

TEST_P(Stages, QueryPassBackward) {
  run([](Stage& s) {
    put_what_queries_need(s);
    s.schedule.query_pass_backward();
    s.check("dW", s.dw, OF(dw));
    s.check("dKt", s.dkt, OF(dkt_of_queries));
    s.check("dQ", s.problem.dquery, s.problem.heads, true, OF(dq_of_queries));
    if (s.problem.extended()) s.check("dmissed", s.dmissed, OF(dmissed));
  });
}

TEST_P(Stages, CoreBackward) {
  run([](Stage& s) {
    put_what_the_core_needs(s);
    s.put(s.dw, OF(dw));
    s.put(s.dkt, OF(dkt_of_queries));
    if (s.problem.extended()) s.put(s.dmissed, OF(dmissed));
    s.schedule.core_backward();
    s.check("dU", s.du, OF(du));
    s.check("delta3", s.delta, OF(delta));
    s.check("dQt", s.dqt, OF(dqt_of_core));
    s.check("dKt", s.dkt, OF(dkt));
  });
}

TEST_P(Stages, KeyPassBackward) {
  run([](Stage& s) {
    s.put(s.qt, OF(qt));
    s.put(s.lse, OF(lse));
    s.put(s.du, OF(du));
    s.put(s.delta, OF(delta));
    s.put(s.dqt, OF(dqt_of_core));
    s.put(s.dkt, OF(dkt));
    s.put(s.dw, OF(dw));
    if (s.problem.window > 0) {
      s.put(s.lse1, OF(lse1));
      s.put(s.delta1, OF(delta1));
    }
    s.schedule.key_pass_backward();
    s.check("dK", s.problem.dkey, s.problem.kv_heads, false, OF(dk));
    s.check("dV", s.problem.dvalue, s.problem.kv_heads, false, OF(dv));
    s.check("dQt", s.dqt, OF(dqt));
    s.check_convolution();
  });
}

TEST_P(Stages, LandmarksBackward) {
  run([](Stage& s) {
    s.put_dquery(OF(dq_of_queries));
    s.put(s.dqt, OF(dqt));
    s.schedule.landmarks_backward();
    s.check("dQ", s.problem.dquery, s.problem.heads, true, OF(dq), 2);  // rounded twice
  });
}

INSTANTIATE_TEST_SUITE_P(, Stages, testing::ValuesIn(kCases), [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nystrom_test
