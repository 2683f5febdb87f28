/* Independent chains of fused multiply-adds on the widest vectors: what the floating-point units can do at most. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { CHAINS = 12 };

typedef float vector __attribute__((vector_size(4 * LANES)));

/* 2 * CHAINS * LANES floating-point operations a round. */
float chains(long rounds, float x, float y) {
  vector a[CHAINS];
  for (int i = 0; i < CHAINS; ++i)
    for (int j = 0; j < LANES; ++j) a[i][j] = (float)i;
  for (long r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) a[i] = a[i] * x + y;
  float sum = 0;
  for (int i = 0; i < CHAINS; ++i) sum += a[i][i % LANES];
  return sum;
}

int flops_per_round(void) { return 2 * CHAINS * LANES; }
