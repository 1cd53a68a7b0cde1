// x [rows, k] times packed weights -> [rows, n], in fp32 and bf16.
//
// Weights are packed in pairs of panels of 16 outputs (tile.h): [k / 2][2][16][2] in bf16, [k][2][16] in fp32. With few rows
// the product is as fast as weights come from memory.
#include "tiled.h"

template <typename S>
struct Linear {
  const S *x, *weights;
  int64_t rows, steps, x_stride;  // steps and stride count operands
  Output to;

  int64_t work() const { return rows * to.pairs() * kPair * steps; }
  void run(const Team& team) const {
    const int64_t size = steps * kPair;
    const SpacedRows<S> in = SpacedRows<S>::make(team, x, rows, steps, x_stride);
    const auto tile = [&](auto count, int64_t row, int64_t pair, Ahead ahead) {
      const int ROWS = decltype(count)::value;
      floats sums[ROWS][2] = {};
      multiply<S, ROWS>(sums, in.x + row * in.stride, in.stride, weights + pair * size, steps, ahead);
      for (int r = 0; r < ROWS; r++) to.put(sums[r][0], sums[r][1], row + r, pair);
    };
    over_pairs<kTileRows>(team, rows, to.pairs(), weights, size * sizeof(S), tile);
  }
};

#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
// The same in bf16 by tile registers. Sums come out in another order than those of Linear.
struct TiledLinear {
  const bf16* x;
  const uint32_t* weights;
  int64_t rows, k, x_stride;
  Output to;

  int64_t work() const { return rows * to.pairs() * kPair * k / 2; }
  void run(const Team& team) const {
    const TileRows in = TileRows::make<2>(team, x, rows, k, x_stride, team.shared->workspace.data());
    const int64_t steps = k / 2, size = steps * kPair;
    over_blocks<DotBf16>(team, in, rows, to.pairs(), steps, size, [&](int64_t pair) { return weights + pair * size; },
                         [&](const float* sums, int64_t row, int64_t pair) {
                           to.put(load16(sums), load16(sums + kLanes), row, pair);
                         });
  }
};
#endif

// bf16: k and x_stride are even. tiled: by tile registers, which a library has or not (has_tiles), for bf16 alone.
EXPORT void linear(int dtype, const void* x, const void* weights, const void* bias, void* out, int bias_dtype,
                   int64_t rows, int64_t n, int64_t k, int64_t x_stride, int out_dtype, int gate, int tiled, int threads) {
  const Output to{out, bias, n, out_dtype, bias_dtype, Gate(gate)};
  if (dtype == 0) {
    reserve(SpacedRows<float>::workspace(rows, k, x_stride));
    submit(Linear<float>{(const float*)x, (const float*)weights, rows, k, x_stride, to}, threads);
    return;
  }
#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
  if (tiled) {
    reserve(TileRows::workspace(rows, k / 2));
    submit(TiledLinear{(const bf16*)x, (const uint32_t*)weights, rows, k, x_stride, to}, threads);
    return;
  }
#endif
  reserve(SpacedRows<uint32_t>::workspace(rows, k / 2, x_stride / 2));
  submit(Linear<uint32_t>{(const uint32_t*)x, (const uint32_t*)weights, rows, k / 2, x_stride / 2, to}, threads);
}

EXPORT int has_tiles() { return kTiles; }

// Rows of a packed weight: words of one lane, step after step.
struct PackedRows {
  const int64_t* ids;
  const uint32_t* weights;
  uint32_t* out;
  int64_t tokens, steps;
  int64_t work() const { return 8 * tokens * steps; }  // a cache line for each word
  void run(const Team& team) const {
    for (int64_t t = team.first(tokens); t < team.last(tokens); t++) {
      const uint32_t* from = weights + ids[t] / kPair * steps * kPair + ids[t] % kPair;
      for (int64_t k = 0; k < steps; k++) out[t * steps + k] = from[k * kPair];
    }
  }
};

// out: [tokens, steps] of words, as `pack_linear` took them.
EXPORT void packed_rows(const int64_t* ids, const uint32_t* weights, uint32_t* out, int64_t tokens, int64_t steps,
                        int threads) {
  submit(PackedRows{ids, weights, out, tokens, steps}, threads);
}

// weight: [n, k] of words (`steps` of them a row) -> pairs of panels [steps][2][16]; missing outputs are zero.
EXPORT void pack_linear(const uint32_t* weight, uint32_t* out, int64_t n, int64_t steps, int64_t stride, int threads) {
  const int64_t pairs = (n + kPair - 1) / kPair;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t pair = 0; pair < pairs; pair++) {
    const int64_t count = std::min(kPair, n - pair * kPair);
    const uint32_t* from = weight + pair * kPair * stride;
    uint32_t* to = out + pair * steps * kPair;
    for (int64_t k = 0; k < steps; k++)
      for (int64_t lane = 0; lane < kPair; lane++) to[k * kPair + lane] = lane < count ? from[lane * stride + k] : 0u;
  }
}
