// mma.m16n8k16 and ldmatrix.x4: who holds which element is the PTX manual's, with group = lane / 4, pair = lane % 4.
#include "machine.h"
#include "shadow.h"

namespace simt {
namespace {

typedef float Row __attribute__((vector_size(32)));  // 8 columns

struct MmaData {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

struct LdmatrixData {
  uint32_t* r;
  const char* row;
};

// The two bf16 of a register.
float low(uint32_t bits) { return __uint_as_float(bits << 16); }
float high(uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); }

template <class Data>
const Data& data_of(const Warp& warp, int lane) {
  return *static_cast<const Data*>(warp.request[lane].data);
}

void gather(const Warp& warp, float (&a)[16][16], Row (&b)[16]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = data_of<MmaData>(warp, lane);
    const int group = lane / 4, pair = lane % 4;
    for (int r = 0; r < 4; ++r) {
      float* to = &a[group + 8 * (r & 1)][2 * pair + 8 * (r >> 1)];
      to[0] = low(own.a[r]);
      to[1] = high(own.a[r]);
    }
    for (int r = 0; r < 2; ++r) {
      b[2 * pair + 8 * r][group] = low(own.b[r]);
      b[2 * pair + 8 * r + 1][group] = high(own.b[r]);
    }
  }
}

// The conflicts of one matrix: rows of 16 bytes that are not the same but share the same four of 32 banks.
int conflicts(const LdmatrixData* const (&rows)[8]) {
  int count = 0;
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < i; ++j) {
      const ptrdiff_t distance = rows[i]->row - rows[j]->row;
      count += distance != 0 && distance % 128 == 0;
    }
  }
  return count;
}

void check_row(const char* row, int lane) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: the row of lane %d is not aligned to 16 bytes", lane);
  if (!machine.in_shared(row, 16)) {
    fail("ldmatrix: the row of lane %d is outside shared memory: offset %td of %zu bytes", lane, row - machine.shared,
         machine.launch.shared_bytes);
  }
}

}  // namespace

void execute_mma(const Warp& warp) {
  ++machine.stats.mma;
  float a[16][16];
  Row b[16];
  gather(warp, a, b);
  for (int i = 0; i < 16; ++i) {
    Row sum = {};
    for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k];
    for (int pair = 0; pair < 4; ++pair) {
      float* c = data_of<MmaData>(warp, i % 8 * 4 + pair).c + i / 8 * 2;
      c[0] += sum[2 * pair];
      c[1] += sum[2 * pair + 1];
    }
  }
}

void execute_ldmatrix(const Warp& warp, bool trans) {
  ++machine.stats.ldmatrix;
  for (int i = 0; i < 4; ++i) {
    const LdmatrixData* rows[8];
    uint16_t m[8][8];
    for (int j = 0; j < 8; ++j) {
      rows[j] = &data_of<LdmatrixData>(warp, 8 * i + j);
      check_row(rows[j]->row, 8 * i + j);
      shadow::read_by_warp(rows[j]->row, 16, "ldmatrix");
      std::memcpy(m[j], rows[j]->row, 16);
    }
    machine.stats.ldmatrix_conflicts += uint64_t(conflicts(rows));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      const uint32_t low = trans ? m[2 * pair][group] : m[group][2 * pair];
      const uint32_t high = trans ? m[2 * pair + 1][group] : m[group][2 * pair + 1];
      data_of<LdmatrixData>(warp, lane).r[i] = low | high << 16;
    }
  }
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaData data = {c, a, {b0, b1}};
  together({Op::mma, ~0u, &data});
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool trans) {
  LdmatrixData data = {r, static_cast<const char*>(row)};
  together({trans ? Op::ldmatrix_trans : Op::ldmatrix, ~0u, &data});
}

}  // namespace simt
