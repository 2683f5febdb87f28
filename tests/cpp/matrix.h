// Matrices of doubles with the obvious loops: the arithmetic of the reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace nystrom_test {

struct Matrix {
  int64_t rows = 0, columns = 0;
  std::vector<double> x;

  Matrix() = default;
  Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns), x(size_t(rows * columns)) {}
  double& operator()(int64_t i, int64_t j) { return x[size_t(i * columns + j)]; }
  double operator()(int64_t i, int64_t j) const { return x[size_t(i * columns + j)]; }
};

// The matrix whose element (i, j) is f(i, j).
template <class F>
Matrix generate(int64_t rows, int64_t columns, const F& f) {
  Matrix to(rows, columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to(i, j) = f(i, j);
  }
  return to;
}

inline Matrix transposed(const Matrix& a) {
  return generate(a.columns, a.rows, [&](int64_t i, int64_t j) { return a(j, i); });
}

inline Matrix operator*(const Matrix& a, const Matrix& b) {
  return generate(a.rows, b.columns, [&](int64_t i, int64_t j) {
    double total = 0;
    for (int64_t k = 0; k < a.columns; ++k) total += a(i, k) * b(k, j);
    return total;
  });
}

inline Matrix operator*(double alpha, const Matrix& a) {
  return generate(a.rows, a.columns, [&](int64_t i, int64_t j) { return alpha * a(i, j); });
}

inline Matrix operator+(const Matrix& a, const Matrix& b) {
  return generate(a.rows, a.columns, [&](int64_t i, int64_t j) { return a(i, j) + b(i, j); });
}

inline Matrix identity(int64_t n, double diagonal) {
  return generate(n, n, [&](int64_t i, int64_t j) { return i == j ? diagonal : 0.0; });
}

// Rows first .. first + n - 1.
inline Matrix rows_of(const Matrix& a, int64_t first, int64_t n) {
  return generate(n, a.columns, [&](int64_t i, int64_t j) { return a(first + i, j); });
}

inline Matrix columns_of(const Matrix& a, int64_t first, int64_t n) {
  return generate(a.rows, n, [&](int64_t i, int64_t j) { return a(i, first + j); });
}

inline Matrix below(const Matrix& a, const Matrix& b) {
  return generate(a.rows + b.rows, b.columns,
                  [&](int64_t i, int64_t j) { return i < a.rows ? a(i, j) : b(i - a.rows, j); });
}

inline Matrix beside(const Matrix& a, const Matrix& b) { return transposed(below(transposed(a), transposed(b))); }

// Logarithm of the sum of the exponentials of each row.
inline Matrix logsumexp(const Matrix& a) {
  return generate(a.rows, 1, [&](int64_t i, int64_t) {
    double top = -HUGE_VAL, total = 0;
    for (int64_t j = 0; j < a.columns; ++j) top = std::fmax(top, a(i, j));
    for (int64_t j = 0; j < a.columns; ++j) total += std::exp(a(i, j) - top);
    return top + std::log(total);
  });
}

inline Matrix softmax(const Matrix& a) {
  const Matrix lse = logsumexp(a);
  return generate(a.rows, a.columns, [&](int64_t i, int64_t j) { return std::exp(a(i, j) - lse(i, 0)); });
}

// Row sums of a * b, element by element.
inline Matrix row_dots(const Matrix& a, const Matrix& b) {
  return generate(a.rows, 1, [&](int64_t i, int64_t) {
    double total = 0;
    for (int64_t j = 0; j < a.columns; ++j) total += a(i, j) * b(i, j);
    return total;
  });
}

// Backward of a row softmax: p * (dp - delta), delta the rows' sums of p * dp.
inline Matrix softmax_backward(const Matrix& p, const Matrix& dp, const Matrix& delta) {
  return generate(p.rows, p.columns, [&](int64_t i, int64_t j) { return p(i, j) * (dp(i, j) - delta(i, 0)); });
}

}  // namespace nystrom_test
