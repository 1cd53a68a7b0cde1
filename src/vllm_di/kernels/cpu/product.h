// What products have in common: how they are shared out, and what becomes of a sum.
#pragma once
#include "tile.h"

// out [rows, n], with a bias or none. Types: 0 is fp32, 1 is bf16.
struct Output {
  void* out;
  const void* bias;
  int64_t n;
  int out_dtype, bias_dtype;

  // Up to 16 outputs of a row, from output `first`.
  inline void put(floats sum, int64_t row, int64_t first) const {
    if (out_dtype == 0)
      finish((float*)out + row * n + first, sum, first);
    else
      finish((bf16*)out + row * n + first, sum, first);
  }

 private:
  template <typename T>
  inline void finish(T* to, floats sum, int64_t first) const {
    const int64_t count = std::min(kLanes, n - first);
    if (bias) {
      for (int64_t i = 0; i < count; i++)
        sum[i] += bias_dtype == 0 ? load((const float*)bias + first + i) : load((const bf16*)bias + first + i);
    }
    if (count == kLanes)
      store16(to, sum);
    else
      store_some(to, sum, count);
  }
};

// Calls body(panel, row, end) for this thread's share of panels times spans of rows. Few rows: each thread takes a run of
// panels. Many: groups of kTilePanels panels stay in the nearest cache while a span of rows passes over them.
template <typename Body>
static inline void share_out(const Team& team, int64_t rows, int64_t n, int64_t span, const Body& body) {
  const int64_t panels = (n + kLanes - 1) / kLanes, spans = (rows + span - 1) / span;
  const int64_t run = spans > 1 ? kTilePanels : (panels + team.count - 1) / team.count;
  const int64_t pieces = (panels + run - 1) / run * spans;
  for (int64_t i = team.first(pieces); i < team.last(pieces); i++) {
    const int64_t begin = i / spans * run, end = std::min(panels, begin + run);
    body(begin, end, i % spans * span, std::min(rows, (i % spans + 1) * span));
  }
}

// Calls tile(ROWS as a constant, row) over [row, end), in tiles of like height: 8 rows are 4 and 4, not 6 and 2.
template <int MOST, typename Body>
static inline void over_rows(int64_t row, int64_t end, const Body& tile) {
  while (row < end) {
    const int64_t left = end - row, tiles = (left + MOST - 1) / MOST, count = (left + tiles - 1) / tiles;
    switch (count) {
      case 1: tile(std::integral_constant<int, 1>{}, row); break;
      case 2: tile(std::integral_constant<int, 2>{}, row); break;
      case 3: tile(std::integral_constant<int, 3>{}, row); break;
      case 4: tile(std::integral_constant<int, MOST < 4 ? 1 : 4>{}, row); break;
      case 5: tile(std::integral_constant<int, MOST < 5 ? 1 : 5>{}, row); break;
      case 6: tile(std::integral_constant<int, MOST < 6 ? 1 : 6>{}, row); break;
      case 7: tile(std::integral_constant<int, MOST < 7 ? 1 : 7>{}, row); break;
      case 8: tile(std::integral_constant<int, MOST < 8 ? 1 : 8>{}, row); break;
    }
    row += count;
  }
}
