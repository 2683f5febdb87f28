// One call of the operator on plain memory: what csrc/ops does with torch's tensors, without torch.
//
// Every buffer has exactly the size that csrc/ops allocates and begins as NaN where csrc/ops leaves memory as it comes,
// so that AddressSanitizer sees a kernel that reads too far, and a comparison one that reads what none wrote. Padding
// of the inputs is NaN too.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace nystrom_test {

using namespace nystrom_ext;

enum class Mask { none, tail, holes, all };  // all: the first sample has no valid token

struct Case {
  std::string name;
  int64_t batch = 2, heads = 2, kv_heads = 2, queries = 40, keys = 40, head_dim = 8, value_dim = 8, landmarks = 8;
  int64_t taps = 0, window = 0, pinned = 0;
  double dropout_p = 0;
  bool global_coefficient = false, strided = false;  // strided: the features of one token are not adjacent
  Mask mask = Mask::none;
};

inline const std::vector<Dtype> kDtypes = {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16};
const char* name_of(Dtype dtype);

class Call {
 public:
  // The same case and dtype give the same numbers, float64 those that the other types round.
  Call(const Case& c, Dtype dtype);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Dtype dtype;
  Forward forward;
  Backward backward;  // shares all buffers; `out` is the gradient that arrives

  // Asks the backward pass for these gradients alone: what csrc/ops does not allocate then is null.
  void want(const Wanted& wanted);

  // An element of an operand, or of a buffer in the accumulation type.
  double read(const Operand& x, int64_t b, int64_t h, int64_t t, int64_t feature) const;
  void write(const Operand& x, int64_t b, int64_t h, int64_t t, int64_t feature, double value);
  double read(const void* buffer, int64_t i) const;
  void write(void* buffer, int64_t i, double value);

  // Memory of this call's accumulation type, NaN or zero.
  void* buffer(int64_t elements, bool zero = false);

  // The elements of an operand in the order (b, h, t, feature).
  std::vector<double> values(const Operand& x, int64_t heads, int64_t tokens, int64_t features) const;

 private:
  std::vector<std::unique_ptr<char[]>> memory_;

  void* allocate(int64_t bytes, bool zero);
  Operand operand(int64_t heads, int64_t tokens, int64_t features, bool strided, bool zero);
  void plan(Tokens& side, int64_t length, Mask mask);
  void fill(const Operand& x, int64_t heads, int64_t features, const Tokens& tokens, unsigned seed);
};

}  // namespace nystrom_test
