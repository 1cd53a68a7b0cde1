// x [rows, k] times packed weights -> [rows, n].
//
// Weights are packed in panels of 16 outputs. In bf16 a panel holds pairs along k, [k / 2][16][2]: one instruction of
// AVX512-BF16 multiplies a pair of x, broadcast, with the pairs of 16 outputs, and no sum across lanes is ever needed.
// In fp32 a panel is [k][16]. Each tile of panels stays in the nearest cache while all rows pass over it.
#include "common.h"

typedef uint32_t u16 __attribute__((vector_size(64)));

#if defined(__AVX512BF16__)
static inline f16 multiply_add(f16 sum, uint32_t pair, const uint32_t* weights) {
  return (f16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair),
                               (__m512bh)_mm512_loadu_si512(weights));
}
#else
static inline float high(uint32_t pair) {
  uint32_t bits = pair & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline f16 multiply_add(f16 sum, uint32_t pair, const uint32_t* weights) {
  u16 w;
  std::memcpy(&w, weights, 64);
  sum += high(pair << 16) * (f16)(w << 16);
  return sum + high(pair) * (f16)(w & 0xffff0000u);
}
#endif
static inline f16 multiply_add(f16 sum, float x, const float* weights) {
  f16 w;
  std::memcpy(&w, weights, 64);
  return sum + x * w;
}

static const int64_t kSpan = 192;  // rows of a piece of work, a multiple of the tile's rows

struct Product {
  const void* x;
  const void* weights;
  const float* bias;
  void* out;
  int64_t rows, n, k, x_stride;  // k counts pairs in bf16
  int out_dtype;
};

template <typename T>
static inline void finish(T* out, f16 sum, const float* bias, int64_t count) {
  if (count == kLanes) {
    store16(out, bias ? sum + load16(bias) : sum);
    return;
  }
  for (int64_t i = 0; i < count; i++) store(out + i, sum[i] + (bias ? bias[i] : 0.f));
}

// ROWS rows times PANELS panels. S is what one step along k loads: a pair of bf16, or a float.
template <typename S, int ROWS, int PANELS>
static void tile(const Product& p, int64_t row, int64_t panel) {
  const S* x = (const S*)p.x + row * p.x_stride;
  const S* w = (const S*)p.weights + panel * p.k * kLanes;
  f16 sums[ROWS][PANELS];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < PANELS; c++) sums[r][c] = f16{};
  for (int64_t k = 0; k < p.k; k++) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int c = 0; c < PANELS; c++)
        sums[r][c] = multiply_add(sums[r][c], x[r * p.x_stride + k],
                                  w + (c * p.k + k) * kLanes);
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < PANELS; c++) {
      int64_t first = (panel + c) * kLanes, count = std::min(kLanes, p.n - first);
      int64_t at = (row + r) * p.n + first;
      if (p.out_dtype == 0)
        finish((float*)p.out + at, sums[r][c], p.bias ? p.bias + first : nullptr, count);
      else
        finish((bf16*)p.out + at, sums[r][c], p.bias ? p.bias + first : nullptr, count);
    }
}

template <typename S, int PANELS>
static void rows_of(const Product& p, int64_t panel, int64_t row, int64_t end) {
  for (; row + 6 <= end; row += 6) tile<S, 6, PANELS>(p, row, panel);
  switch (end - row) {
    case 5: tile<S, 5, PANELS>(p, row, panel); break;
    case 4: tile<S, 4, PANELS>(p, row, panel); break;
    case 3: tile<S, 3, PANELS>(p, row, panel); break;
    case 2: tile<S, 2, PANELS>(p, row, panel); break;
    case 1: tile<S, 1, PANELS>(p, row, panel); break;
  }
}

template <typename S>
static void product(const Product& p, int threads) {
  // pieces of work: a group of panels times a span of rows, all spans of a group one after the other
  int64_t panels = (p.n + kLanes - 1) / kLanes, groups = (panels + 3) / 4;
  int64_t spans = (p.rows + kSpan - 1) / kSpan;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < groups * spans; i++) {
    int64_t panel = i / spans * 4, row = i % spans * kSpan, end = std::min(p.rows, row + kSpan);
    if (panel + 4 <= panels)
      rows_of<S, 4>(p, panel, row, end);
    else
      for (; panel < panels; panel++) rows_of<S, 1>(p, panel, row, end);
  }
}

EXPORT void linear(int dtype, const void* x, const void* weights, const float* bias, void* out,
                   int64_t rows, int64_t n, int64_t k, int64_t x_stride, int out_dtype,
                   int threads) {
  if (dtype == 0)
    product<float>(Product{x, weights, bias, out, rows, n, k, x_stride, out_dtype}, threads);
  else  // strides and k in pairs
    product<uint32_t>(Product{x, weights, bias, out, rows, n, k / 2, x_stride / 2, out_dtype},
                      threads);
}
