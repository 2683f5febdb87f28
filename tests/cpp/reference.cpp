#include "reference.h"

#include <algorithm>

namespace nystrom_test {
namespace {

std::vector<int64_t> valid(const Tokens& tokens, int64_t b) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < tokens.length; ++i) {
    if (tokens.ignored == nullptr || !tokens.ignored[b * tokens.length + i]) found.push_back(i);
  }
  return found;
}

Matrix gather(const Call& call, const Operand& x, int64_t b, int64_t h, const std::vector<int64_t>& at, int64_t width) {
  return generate(int64_t(at.size()), width, [&](int64_t i, int64_t j) { return call.read(x, b, h, at[i], j); });
}

// Segment j holds ranks ends[j] .. ends[j + 1] - 1.
std::vector<int64_t> segments(int64_t n, int64_t m) {
  std::vector<int64_t> ends;
  for (int64_t j = 0; j <= std::min(n, m); ++j) ends.push_back(n == 0 ? 0 : j * n / std::min(n, m));
  return ends;
}

// Means over the segments without the first `pinned` ranks; zeros where none is left.
Matrix means(const Matrix& x, const std::vector<int64_t>& ends, int64_t pinned) {
  return generate(int64_t(ends.size()) - 1, x.columns, [&](int64_t j, int64_t feature) {
    const int64_t begin = std::max(ends[j], pinned), end = std::max(ends[j + 1], pinned);
    double total = 0;
    for (int64_t i = begin; i < end; ++i) total += x(i, feature);
    return total / double(std::max<int64_t>(end - begin, 1));
  });
}

}  // namespace

int64_t Reference::count(int64_t j) const { return std::max(key_ends[j + 1], pinned) - std::max(key_ends[j], pinned); }

void Reference::describe(const Call& call, int64_t problem) {
  const Forward& f = call.forward;
  b = problem / f.heads;
  h = problem % f.heads;
  scale = f.scale;
  positions = valid(f.queries, b);
  keys = valid(f.keys, b);
  q = gather(call, f.query, b, h, positions, f.head_dim);
  k = gather(call, f.key, b, h / f.group(), keys, f.head_dim);
  v = gather(call, f.value, b, h / f.group(), keys, f.value_dim);
  dout = gather(call, call.backward.out, b, h, positions, f.value_dim);
  regime = k.rows == 0                                   ? empty
           : k.rows <= f.landmarks || k.rows <= f.pinned ? exact_keys
           : q.rows <= f.landmarks                       ? exact_queries
                                                         : nystrom;
  m = f.landmarks;
  window = regime == nystrom ? f.window : 0;
  pinned = regime == nystrom ? f.pinned : 0;
  ends = segments(q.rows, m);
  key_ends = segments(k.rows, m);
}

void Reference::landmarks() {
  qt = means(q, ends, 0);
  kt = regime == exact_keys ? k : below(means(k, key_ends, pinned), rows_of(k, 0, pinned));
}

void Reference::key_pass() {
  const Matrix s3 = scale * (qt * transposed(rows_of(k, pinned, k.rows - pinned)));
  lse = logsumexp(s3);
  u = softmax(s3) * rows_of(v, pinned, v.rows - pinned);
}

// A and its coefficient. Rows of a softmax sum to one.
void Reference::similarity() {
  const Matrix s2 = scale * (qt * transposed(rows_of(kt, 0, m)));
  a = softmax(generate(m, m, [&](int64_t i, int64_t j) { return count(j) == 0 ? -HUGE_VAL : s2(i, j); }));
  for (int64_t j = 0; j < m; ++j) {
    double total = 0;
    for (int64_t i = 0; i < m; ++i) total += a(i, j);
    if (total > c) c = total, argmax = j;
  }
}

void Reference::core(int64_t iterations) {
  z = {1 / c * transposed(a)};
  for (int64_t i = 0; i < iterations; ++i) {
    const Matrix x = a * z.back(), t2 = identity(m, 15) + -1 * (x * (identity(m, 7) + -1 * x));
    z.push_back(0.25 * (z.back() * (identity(m, 13) + -1 * (x * t2))));
  }
  w = below(z.back() * u, rows_of(v, 0, pinned));
  const Matrix s2 = scale * (qt * transposed(rows_of(kt, 0, m)));
  const Matrix mass = logsumexp(generate(m, m, [&](int64_t i, int64_t j) { return s2(i, j) + std::log(count(j)); }));
  missed = lse + -1 * mass;
}

// The softmax over landmarks, pinned tokens and, with a window, all tokens, of which the distant ones get -infinity.
void Reference::query_pass(const Call& call) {
  if (regime == exact_queries) {
    out = u;
  } else if (regime == empty) {
    out = Matrix(q.rows, v.columns);
  } else {
    const bool extended = window > 0 || pinned > 0;
    near = window > 0 ? k : Matrix(0, k.columns);
    values = window > 0 ? below(w, v) : w;
    Matrix s1 = scale * (q * transposed(below(kt, near)));
    for (int64_t i = 0; i < q.rows && extended; ++i) {
      const auto seen = [&](int64_t j) { return std::abs(i - j) <= window && j >= pinned; };
      const int64_t sigma = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin() - 1;
      for (int64_t j = 0; j < m; ++j) {
        int64_t left = count(j);
        for (int64_t t = key_ends[j]; t < key_ends[j + 1] && window > 0; ++t) left -= seen(t);
        s1(i, j) += std::log(double(left)) + missed(sigma, 0);
      }
      for (int64_t j = 0; j < near.rows; ++j) {
        if (!seen(j)) s1(i, m + pinned + j) = -HUGE_VAL;
      }
    }
    p1 = softmax(s1);
    lse1 = logsumexp(s1);
    out = p1 * values;
  }
  if (call.forward.taps > 0) {
    out = out + convolved(call, call.forward.value, call.forward.keys, h / call.forward.group(), call.forward.taps / 2,
                          false, positions);
  }
}

// Rows `at` of y_i = sum_t w_t x_{i + t - shift}, zero outside and at ignored tokens.
Matrix Reference::convolved(const Call& call, const Operand& x, const Tokens& tokens, int64_t head, int64_t shift,
                            bool reversed, const std::vector<int64_t>& at) const {
  const Forward& f = call.forward;
  return generate(int64_t(at.size()), f.value_dim, [&](int64_t i, int64_t feature) {
    double total = 0;
    for (int64_t t = 0; t < f.taps; ++t) {
      const int64_t from = at[i] + t - shift;
      if (from < 0 || from >= tokens.length || (tokens.ignored && tokens.ignored[b * tokens.length + from])) continue;
      const int64_t tap = reversed ? f.taps - 1 - t : t;
      total += call.read(f.conv_weight, 0, 0, h * f.taps + tap, 0) * call.read(x, b, head, from, feature);
    }
    return total;
  });
}

void Reference::query_pass_backward() {
  dq_of_queries = Matrix(q.rows, q.columns);
  dw = Matrix(w.rows, v.columns);
  dkt_of_queries = Matrix(kt.rows, k.columns);
  dmissed = Matrix(qt.rows, 1);
  if (regime == empty || regime == exact_queries) return;
  dp1 = dout * transposed(values);
  delta1 = row_dots(p1, dp1);
  const Matrix ds1 = softmax_backward(p1, dp1, delta1);
  dq_of_queries = scale * (ds1 * below(kt, near));
  dw = transposed(columns_of(p1, 0, w.rows)) * dout;
  dkt_of_queries = scale * (transposed(columns_of(ds1, 0, kt.rows)) * q);
  for (int64_t j = 0; j < m && (window > 0 || pinned > 0); ++j) {
    for (int64_t i = 0, sigma = 0; i < q.rows; ++i) {
      while (ends[sigma + 1] <= i) ++sigma;
      dmissed(sigma, 0) += ds1(i, j);
    }
  }
}

// dU and dA, to which the coefficient's share may be added.
void Reference::core_backward_to_similarity() {
  const Matrix dw_core = rows_of(dw, 0, m);
  du = transposed(z.back()) * dw_core;
  Matrix dz = dw_core * transposed(u);
  da = Matrix(m, m);
  for (auto at = z.rbegin() + 1; at != z.rend(); ++at) {
    const Matrix x = a * *at, t1 = identity(m, 7) + -1 * x, t2 = identity(m, 15) + -1 * (x * t1);
    const Matrix t3 = identity(m, 13) + -1 * (x * t2);
    const Matrix dt3 = 0.25 * (transposed(*at) * dz), dt2 = -1 * (transposed(x) * dt3);
    const Matrix dt1 = -1 * (transposed(x) * dt2);
    const Matrix dx = -1 * (dt3 * transposed(t2)) + -1 * (dt2 * transposed(t1)) + -1 * dt1;
    dz = 0.25 * (dz * transposed(t3)) + transposed(a) * dx;
    da = da + dx * transposed(*at);
  }
  da = da + 1 / c * transposed(dz);
  for (size_t i = 0; i < dz.x.size(); ++i) dc -= dz.x[i] * z[0].x[i] / c;
}

void Reference::core_backward_from_similarity() {
  Matrix ds2 = softmax_backward(a, da, row_dots(a, da));
  const Matrix landmarks = rows_of(kt, 0, m), s2 = scale * (qt * transposed(landmarks));
  const Matrix counted = softmax(generate(m, m, [&](int64_t i, int64_t j) { return s2(i, j) + std::log(count(j)); }));
  ds2 = ds2 + generate(m, m, [&](int64_t i, int64_t j) { return -dmissed(i, 0) * counted(i, j); });
  dqt_of_core = scale * (ds2 * landmarks);
  dkt = dkt_of_queries + below(scale * (transposed(ds2) * qt), Matrix(pinned, k.columns));
  delta = row_dots(du, u) + -1 * dmissed;
}

void Reference::key_pass_backward(const Call& call) {
  const Forward& f = call.forward;
  dk = Matrix(k.rows, k.columns);
  dv = Matrix(v.rows, v.columns);
  if (regime == exact_keys) {
    dk = dkt_of_queries;
    dv = dw;
  } else if (regime != empty) {
    const int64_t left = k.rows - pinned;
    const Matrix some_k = rows_of(k, pinned, left), some_v = rows_of(v, pinned, left);
    const Matrix p3 = softmax(scale * (qt * transposed(some_k)));
    const Matrix ds3 = softmax_backward(p3, du * transposed(some_v), delta);
    dk = below(Matrix(pinned, k.columns), scale * (transposed(ds3) * qt));
    dv = below(Matrix(pinned, v.columns), transposed(p3) * du);
    dqt = dqt_of_core + scale * (ds3 * some_k);
  }
  if (regime == nystrom) {
    for (int64_t i = 0, j = 0; i < k.rows; ++i) {
      while (key_ends[j + 1] <= i) ++j;
      for (int64_t x = 0; x < k.columns; ++x) dk(i, x) += i < pinned ? dkt(m + i, x) : dkt(j, x) / double(count(j));
      for (int64_t x = 0; x < v.columns && i < pinned; ++x) dv(i, x) += dw(m + i, x);
    }
    if (window > 0) {
      const Matrix ds1 = softmax_backward(p1, dp1, delta1);
      dk = dk + scale * (transposed(columns_of(ds1, kt.rows, k.rows)) * q);
      dv = dv + transposed(columns_of(p1, w.rows, v.rows)) * dout;
    }
  }
  dconv = Matrix(1, f.taps);
  if (f.taps == 0) return;
  dv = dv + convolved(call, call.backward.out, f.queries, h, f.taps - 1 - f.taps / 2, true, keys);
  for (int64_t t = 0; t < f.taps; ++t) {
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto key = std::find(keys.begin(), keys.end(), positions[i] + t - f.taps / 2);
      for (int64_t x = 0; x < v.columns && key != keys.end(); ++x) {
        dconv(0, t) += dout(int64_t(i), x) * v(key - keys.begin(), x);
      }
    }
  }
}

void Reference::landmarks_backward() {
  dq = dq_of_queries;
  if (regime == empty || regime == exact_keys) return;
  for (int64_t j = 0; j + 1 < int64_t(ends.size()); ++j) {
    for (int64_t i = ends[j]; i < ends[j + 1]; ++i) {
      for (int64_t x = 0; x < q.columns; ++x) dq(i, x) += dqt(j, x) / double(ends[j + 1] - ends[j]);
    }
  }
}

std::vector<Reference> reference(const Call& call) {
  std::vector<Reference> all(size_t(call.forward.problems()));
  std::vector<Reference*> inner;  // in the Nyström regime
  for (size_t n = 0; n < all.size(); ++n) {
    Reference& r = all[n];
    r.describe(call, int64_t(n));
    r.landmarks();
    if (r.regime == Reference::exact_keys) r.w = r.v;
    if (r.regime == Reference::exact_queries || r.regime == Reference::nystrom) r.key_pass();
    if (r.regime != Reference::nystrom) continue;
    r.similarity();
    inner.push_back(&r);
  }
  const auto most =
      std::max_element(inner.begin(), inner.end(), [](Reference* x, Reference* y) { return x->c < y->c; });
  for (Reference* r : inner) {
    if (call.forward.global_coefficient) r->c = (*most)->c;
  }
  for (Reference* r : inner) r->core(call.forward.iterations);
  for (Reference& r : all) {
    r.query_pass(call);
    r.query_pass_backward();
    r.dkt = r.dkt_of_queries;
    if (r.regime == Reference::exact_queries) {
      r.du = r.dout;
      r.delta = row_dots(r.du, r.u);
      r.dqt_of_core = Matrix(r.qt.rows, r.qt.columns);
    }
  }
  double dc = 0;
  for (Reference* r : inner) {
    r->core_backward_to_similarity();
    dc += r->dc;
  }
  for (Reference* r : inner) {
    const bool global = call.forward.global_coefficient;
    for (int64_t i = 0; i < r->m && (!global || r == *most); ++i) r->da(i, r->argmax) += global ? dc : r->dc;
    r->core_backward_from_similarity();
  }
  for (Reference& r : all) {
    r.key_pass_backward(call);
    r.landmarks_backward();
  }
  return all;
}

}  // namespace nystrom_test
