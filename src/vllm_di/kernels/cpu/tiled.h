// Products by tile registers (tiles.h), for many rows: 32 rows of x times 32 outputs a block, from the same packed weights as
// the other products read.
#pragma once
#include "product.h"
#include "tiles.h"

#if defined(__AMX_TILE__) || defined(EMULATE_TILES)

static const int64_t kBlockWords = kTileHeight * kTileWidth;  // of a register

// The first 16 words of a row: pairs of bf16, or fours of bytes. Of `count` elements that there are; the rest is 0.
template <typename T>
static inline void to_words(uint32_t* to, const T* x, int64_t count) {
  const int64_t whole = 4 * kTileWidth / int64_t(sizeof(T));
  if (count >= whole) {
    std::memcpy(to, x, 64);
    return;
  }
  std::memset(to, 0, 64);
  if (count > 0) std::memcpy(to, x, size_t(count) * sizeof(T));
}
// Floats become bf16.
static inline void to_words(uint32_t* to, const float* x, int64_t count) {
  bf16 narrow[2 * kTileWidth];
  for (int64_t i = 0; i < 2 * kTileWidth; i += kLanes) {
    const int64_t left = std::max(int64_t(0), std::min(kLanes, count - i));
    store16(narrow + i, left == kLanes ? load16(x + i) : load_some(x + i, left));
  }
  std::memcpy(to, narrow, 64);
}

// x as registers read it: [rows in 16s][words in 16s][16][16], from `to` on in the team's workspace; the rest is 0. A row of x
// may be a power of two long, and 16 such rows would fall on the same lines of the first-level cache.
struct TileRows {
  const uint32_t* blocks;
  int64_t columns;  // registers along k

  static int64_t rows_of(int64_t rows) { return (rows + kTileHeight - 1) / kTileHeight; }
  static int64_t columns_of(int64_t steps) { return (steps + kTileWidth - 1) / kTileWidth; }
  static size_t workspace(int64_t rows, int64_t steps) { return size_t(rows_of(rows) * columns_of(steps) * kBlockWords); }

  const uint32_t* row(int64_t row) const { return blocks + row / kTileHeight * columns * kBlockWords; }

  // PER: elements of a word.
  template <int PER, typename T>
  static TileRows make(const Team& team, const T* x, int64_t rows, int64_t k, int64_t x_stride, float* to) {
    const int64_t columns = columns_of((k + PER - 1) / PER), padded = rows_of(rows) * kTileHeight;
    for (int64_t r = team.first(padded); r < team.last(padded); r++) {
      uint32_t* at = (uint32_t*)to + (r / kTileHeight * columns * kTileHeight + r % kTileHeight) * kTileWidth;
      for (int64_t c = 0; c < columns; c++, at += kBlockWords) {
        const int64_t first = c * kTileWidth * PER;
        to_words(at, x + (r < rows ? r * x_stride + first : 0), r < rows ? k - first : 0);
      }
    }
    team.barrier();
    return TileRows{(const uint32_t*)to, columns};
  }
};

// One block: `rows` 16 or 32 rows of x from `x`, times a pair of panels -> sums [32][32]. `tail`: the last steps of the pair,
// [16][32], where `steps` are no multiple of 16. ahead: what is asked for meanwhile, two lines of each 16 steps.
template <typename Dot>
static inline void multiply_block(typename Dot::Sum* sums, const TileRows& in, int64_t row, bool both,
                                  const uint32_t* weights, const uint32_t* tail, int64_t steps, const char* ahead,
                                  int64_t ahead_step) {
  const int64_t whole = steps / kTileHeight;
  const uint32_t *x = in.row(row), *other = in.row(row + kTileHeight);
  block_zero();
  for (int64_t k = 0; k < in.columns; k++) {
    for (int64_t i = 0; i < ahead_step; i += kLine) __builtin_prefetch(ahead + k * ahead_step + i, 0, 2);
    block_add<Dot>(x + k * kBlockWords, other + k * kBlockWords, both, 4 * kTileWidth,
                   k < whole ? weights + k * kTileHeight * kPair : tail);
  }
  block_store(sums, 4 * kPair);
}

// Calls put(sums of a row [32], row, pair) for all rows of x times `pairs` of panels, [steps][2][16] words at panels(pair), of
// this thread's share. What panels(pair) gives lies `size` words before the next pair, or in a buffer: then size is 0.
template <typename Dot, typename Panels, typename Put>
static inline void over_blocks(const Team& team, const TileRows& in, int64_t rows, int64_t pairs, int64_t steps, int64_t size,
                               const Panels& panels, const Put& put) {
  const int64_t left = steps % kTileHeight;
  alignas(64) uint32_t tail[kTileHeight * kPair] = {};
  alignas(64) typename Dot::Sum sums[kBlockRows * kPair];
  tile_config();
  share_out<kBlockRows>(team, rows, pairs, [&](int64_t pair, int64_t last, int64_t row, int64_t end) {
    // the next pair comes from memory meanwhile, a part of it by each block
    const int64_t blocks = (end - row + kBlockRows - 1) / kBlockRows;
    const int64_t part = (4 * size / blocks / in.columns + kLine - 1) / kLine * kLine;
    for (; pair < last; pair++) {
      const uint32_t* at = panels(pair);
      std::memcpy(tail, at + (steps - left) * kPair, size_t(4 * left * kPair));
      const char* next = (const char*)(at + size);
      const int64_t ahead = pair + 1 < last ? part : 0;
      for (int64_t r = row; r < end; r += kBlockRows, next += ahead * in.columns) {
        multiply_block<Dot>(sums, in, r, end - r > kTileHeight, at, tail, steps, next, ahead);
        for (int64_t i = 0; i < std::min(kBlockRows, end - r); i++) put(sums + i * kPair, r + i, pair);
      }
    }
  });
  tile_release();
}

#endif
