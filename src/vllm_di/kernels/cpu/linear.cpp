// x [rows, k] times packed weights -> [rows, n].
//
// Weights are packed in panels of 16 outputs (tile.h): [k / 2][16][2] in bf16, [k][16] in fp32. With few rows the product is
// as fast as weights come from memory; a group of panels stays in the nearest cache while the rows pass over it.
#include "tile.h"

static const int64_t kSpan = 192;     // rows of a piece of work
static const int64_t kSerial = 1 << 15;  // multiplications below which threads cost more than they bring

struct Product {
  const void* x;
  const void* weights;
  const void* bias;
  void* out;
  int64_t rows, n, steps, x_stride;  // steps and stride count operands
  int bias_dtype, out_dtype;
};

// Up to 16 outputs of a row, from output `first`.
template <typename T>
static inline void finish(const Product& p, T* out, floats sum, int64_t first) {
  const int64_t count = std::min(kLanes, p.n - first);
  if (p.bias)
    for (int64_t i = 0; i < count; i++)
      sum[i] += p.bias_dtype == 0 ? load((const float*)p.bias + first + i) : load((const bf16*)p.bias + first + i);
  if (count == kLanes)
    store16(out, sum);
  else
    for (int64_t i = 0; i < count; i++) store(out + i, sum[i]);
}

template <typename S, int ROWS, int PANELS>
static void tile(const Product& p, int64_t row, int64_t panel) {
  floats sums[ROWS][PANELS] = {};
  const int64_t panel_stride = p.steps * kLanes;
  multiply<S, ROWS, PANELS>(sums, (const S*)p.x + row * p.x_stride, p.x_stride,
                            (const S*)p.weights + panel * panel_stride, panel_stride, p.steps);
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < PANELS; c++) {
      const int64_t first = (panel + c) * kLanes, at = (row + r) * p.n + first;
      if (p.out_dtype == 0)
        finish(p, (float*)p.out + at, sums[r][c], first);
      else
        finish(p, (bf16*)p.out + at, sums[r][c], first);
    }
}

template <typename S, int PANELS>
static void rows_of(const Product& p, int64_t panel, int64_t row, int64_t end) {
  while (row < end) {
    // tiles of like height: 8 rows are 4 and 4, not 6 and 2
    const int64_t left = end - row, tiles = (left + kTileRows - 1) / kTileRows;
    const int64_t count = (left + tiles - 1) / tiles;
    switch (count) {
      case 1: tile<S, 1, PANELS>(p, row, panel); break;
      case 2: tile<S, 2, PANELS>(p, row, panel); break;
      case 3: tile<S, 3, PANELS>(p, row, panel); break;
#if defined(__AVX2__)
      case 4: tile<S, 4, PANELS>(p, row, panel); break;
      case 5: tile<S, 5, PANELS>(p, row, panel); break;
      case 6: tile<S, 6, PANELS>(p, row, panel); break;
#endif
    }
    row += count;
  }
}

template <typename S>
static void product(const Product& p, int threads) {
  // few rows: each thread takes a run of panels; many: groups of panels times spans of rows
  const int64_t panels = (p.n + kLanes - 1) / kLanes, spans = (p.rows + kSpan - 1) / kSpan;
  const int64_t run = spans > 1 ? kTilePanels : (panels + threads - 1) / threads;
  const int64_t pieces = (panels + run - 1) / run * spans;
#pragma omp parallel for if (p.rows * p.n * p.steps > kSerial) num_threads(threads) schedule(static)
  for (int64_t i = 0; i < pieces; i++) {
    int64_t panel = i / spans * run;
    const int64_t last = std::min(panels, panel + run);
    const int64_t row = i % spans * kSpan, end = std::min(p.rows, row + kSpan);
    for (; panel + kTilePanels <= last; panel += kTilePanels)
      rows_of<S, kTilePanels>(p, panel, row, end);
    for (; panel < last; panel++) rows_of<S, 1>(p, panel, row, end);
  }
}

// bf16: k and x_stride are even.
EXPORT void linear(int dtype, const void* x, const void* weights, const void* bias, void* out,
                   int bias_dtype, int64_t rows, int64_t n, int64_t k, int64_t x_stride,
                   int out_dtype, int threads) {
  const int64_t width = dtype == 0 ? 1 : 2;  // elements of an operand
  const Product p{x, weights, bias, out, rows, n, k / width, x_stride / width, bias_dtype, out_dtype};
  if (dtype == 0)
    product<float>(p, threads);
  else
    product<uint32_t>(p, threads);
}

// weight: [n, k] of words (`steps` of them a row) -> panels [steps][16]; missing outputs are zero.
EXPORT void pack_linear(const uint32_t* weight, uint32_t* out, int64_t n, int64_t steps,
                        int64_t stride, int threads) {
  const int64_t panels = (n + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t panel = 0; panel < panels; panel++) {
    const int64_t count = std::min(kLanes, n - panel * kLanes);
    const uint32_t* from = weight + panel * kLanes * stride;
    uint32_t* to = out + panel * steps * kLanes;
    for (int64_t k = 0; k < steps; k++)
      for (int64_t lane = 0; lane < kLanes; lane++)
        to[k * kLanes + lane] = lane < count ? from[lane * stride + k] : 0u;
  }
}
