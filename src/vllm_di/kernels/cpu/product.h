// What products have in common: how they are shared out, and what becomes of a sum.
#pragma once
#include "tile.h"

static const int64_t kSpan = 192;   // the most rows of a piece of work
static const int64_t kLine = 64;    // bytes of a cache line
static const int64_t kSoon = 8192;  // bytes that a stream of weights is ahead of its use

template <int N>
using Constant = std::integral_constant<int, N>;

enum Gate { kNone, kSilu, kGeluTanh };

static inline floats gated(Gate gate, floats x) { return gate == kSilu ? silu(x) : gelu_tanh(x); }

// out [rows, n], with a bias or none. Types: 0 is fp32, 1 is bf16. With a gate each pair of panels holds 16 outputs of the
// gate and the 16 that it lets through, n is a multiple of 16, and the bias [2 n] holds the gate's first.
struct Output {
  void* out;
  const void* bias;
  int64_t n;
  int out_dtype, bias_dtype;
  Gate gate;

  int64_t pairs() const { return gate ? n / kLanes : (n + kPair - 1) / kPair; }

  // The sums of a row in a pair of panels.
  inline void put(floats one, floats other, int64_t row, int64_t pair) const {
    if (gate) {
      const int64_t first = pair * kLanes;
      store(gated(gate, biased(one, first, kLanes)) * biased(other, n + first, kLanes), row, first, kLanes);
      return;
    }
    put_panel(one, row, 2 * pair);
    put_panel(other, row, 2 * pair + 1);
  }

  inline void put_panel(floats sum, int64_t row, int64_t panel) const {
    const int64_t first = panel * kLanes, count = std::min(kLanes, n - first);
    if (count > 0) store(biased(sum, first, count), row, first, count);  // else the second of the last two panels
  }

 private:
  inline floats biased(floats sum, int64_t first, int64_t count) const {
    if (bias) {
      for (int64_t i = 0; i < count; i++)
        sum[i] += bias_dtype == 0 ? load((const float*)bias + first + i) : load((const bf16*)bias + first + i);
    }
    return sum;
  }
  inline void store(floats v, int64_t row, int64_t first, int64_t count) const {
    if (out_dtype == 0)
      store_to((float*)out + row * n + first, v, count);
    else
      store_to((bf16*)out + row * n + first, v, count);
  }
  template <typename T>
  static inline void store_to(T* to, floats v, int64_t count) {
    if (count == kLanes)
      store16(to, v);
    else
      store_some(to, v, count);
  }
};

// Bytes from one row to the next, for rows of as many bytes. Rows a multiple of 4 KiB apart fall on the same eight lines of a
// first-level cache of 32 KiB, where each of a tile's twelve drives out another: they lie a line further apart.
static inline int64_t spaced(int64_t bytes) { return bytes % 4096 ? bytes : bytes + kLine; }

// x as tiles read it: where many rows are, and badly spaced, they are copied to the team's workspace.
template <typename S>
struct SpacedRows {
  const S* x;
  int64_t stride;

  static int64_t far(int64_t stride) { return spaced(stride * int64_t(sizeof(S))) / int64_t(sizeof(S)); }
  static bool copies(int64_t rows, int64_t stride) { return rows > kTileRows && far(stride) != stride; }
  static size_t workspace(int64_t rows, int64_t steps, int64_t stride) {
    return copies(rows, stride) ? size_t(rows * far(steps)) : 0;
  }
  static SpacedRows make(const Team& team, const S* x, int64_t rows, int64_t steps, int64_t stride) {
    if (!copies(rows, stride)) return SpacedRows{x, stride};
    S* to = (S*)team.shared->workspace.data();
    for (int64_t r = team.first(rows); r < team.last(rows); r++)
      std::memcpy(to + r * far(steps), x + r * stride, size_t(steps) * sizeof(S));
    team.barrier();
    return SpacedRows{to, far(steps)};
  }
};

// Calls tile(ROWS as a constant, row) over [row, end), in tiles of like height: 8 rows are 4 and 4, not 6 and 2.
template <int MOST, typename Body>
static inline void over_rows(int64_t row, int64_t end, const Body& tile) {
  while (row < end) {
    const int64_t left = end - row, tiles = (left + MOST - 1) / MOST, count = (left + tiles - 1) / tiles;
    switch (count) {
      case 1: tile(Constant<1>{}, row); break;
      case 2: tile(Constant<2>{}, row); break;
      case 3: tile(Constant<3>{}, row); break;
      case 4: tile(Constant<MOST < 4 ? 1 : 4>{}, row); break;
      case 5: tile(Constant<MOST < 5 ? 1 : 5>{}, row); break;
      case 6: tile(Constant<MOST < 6 ? 1 : 6>{}, row); break;
      case 7: tile(Constant<MOST < 7 ? 1 : 7>{}, row); break;
      case 8: tile(Constant<MOST < 8 ? 1 : 8>{}, row); break;
      case 9: tile(Constant<MOST < 9 ? 1 : 9>{}, row); break;
      case 10: tile(Constant<MOST < 10 ? 1 : 10>{}, row); break;
      case 11: tile(Constant<MOST < 11 ? 1 : 11>{}, row); break;
      case 12: tile(Constant<MOST < 12 ? 1 : 12>{}, row); break;
    }
    row += count;
  }
}

// Calls body(begin, end, row, last) for this thread's share of `units` of weights times spans of rows. Few rows: each thread
// takes one run of units. Many: a span of rows stays in the second-level cache while all units pass by. Spans are of like
// height, so that threads have as much to do, and begin at a multiple of STEP rows.
template <int STEP = 1, typename Body>
static inline void share_out(const Team& team, int64_t rows, int64_t units, const Body& body) {
  const int64_t spans = (rows + kSpan - 1) / kSpan, steps = (rows + STEP - 1) / STEP, last = team.last(units * spans);
  const auto start = [&](int64_t span) { return std::min(rows, steps * span / spans * STEP); };
  for (int64_t i = team.first(units * spans); i < last;) {
    const int64_t begin = i % units, end = std::min(units, begin + last - i), span = i / units;
    body(begin, end, start(span), start(span + 1));
    i += end - begin;
  }
}

// The same for tiles of pairs of panels, `size` bytes of `weights` each: calls tile(ROWS as a constant, row, pair, ahead). With
// few rows memory sets the pace, and is asked for what lies a little further on. With many it is asked for the next pair, a
// part of it by each tile.
template <int MOST, typename Tile>
static inline void over_pairs(const Team& team, int64_t rows, int64_t pairs, const void* weights, int64_t size,
                              const Tile& tile) {
  share_out(team, rows, pairs, [&](int64_t pair, int64_t last, int64_t row, int64_t end) {
    for (; pair < last; pair++)
      over_rows<MOST>(row, end, [&](auto count, int64_t r) {
        const char* at = (const char*)weights + pair * size;
        const int64_t part = (r - row) * size / (end - row) / kLine * kLine;
        const Ahead next{at + size + part, pair + 1 < last}, soon{at + kSoon, 2};
        tile(count, r, pair, end - row > MOST ? next : soon);
      });
  });
}
