// What both ways of attention share: where keys and values lie, and the running softmax.
#pragma once
#include <type_traits>

#include "tile.h"

static const int64_t kChunk = 64;         // keys that are scored at a time
static const int kVectors = kChunk / kLanes;
static const float kLowest = -1e30f;      // stands for minus infinity, but subtracts from itself to 0

struct Paged {
  const void *q, *keys, *values;
  void* out;
  const int32_t *query_start, *seq_lens, *block_table;
  int64_t seqs, heads, kv_heads, head_size, block_size, table_stride, q_stride;
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window;         // 0: none
  int64_t group() const { return heads / kv_heads; }
  int64_t queries(int64_t seq) const { return query_start[seq + 1] - query_start[seq]; }
  int64_t offset(int64_t seq) const { return seq_lens[seq] - queries(seq); }  // position of the first query
  int64_t first_seen(int64_t position) const {
    return window ? std::max<int64_t>(0, position - window + 1) : 0;
  }
  // Row r of a piece that begins with query `first` of a sequence: queries, and the heads of the group within each.
  int64_t element(int64_t seq, int64_t kv_head, int64_t first, int64_t r, int64_t token_stride) const {
    return (query_start[seq] + first + r / group()) * token_stride +
           (kv_head * group() + r % group()) * head_size;
  }
};

// What a row has seen so far.
struct Softmax {
  float top, mass;  // largest score; sum of exp(score - top)
};

// Keys [start, start + count) of one kv head of a sequence, where they lie.
template <typename T>
struct Chunk {
  int64_t start, count;
  const T *keys[kChunk], *values[kChunk];

  // At most kChunk of the keys [from, end).
  void find(const Paged& p, int64_t seq, int64_t kv_head, int64_t from, int64_t end) {
    start = from;
    count = std::min(kChunk, end - from);
    const int32_t* table = p.block_table + seq * p.table_stride;
    int64_t block = from / p.block_size, slot = from % p.block_size;
    for (int64_t j = 0; j < count;) {
      const int64_t at = ((table[block++] * p.kv_heads + kv_head) * p.block_size + slot) * p.head_size;
      const T *key = (const T*)p.keys + at, *value = (const T*)p.values + at;
      for (; slot < p.block_size && j < count; slot++, j++, key += p.head_size, value += p.head_size) {
        keys[j] = key;
        values[j] = value;
      }
      slot = 0;
    }
    for (int64_t j = count; j % 4; j++) {  // taken in fours, then masked
      keys[j] = keys[count - 1];
      values[j] = values[count - 1];
    }
  }
};

// Raw scores [kChunk] become weights, those outside [from, to) 0. Returns by how much the sums so far shrink.
template <bool MASKED>
static inline float soften(const Paged& p, int from, int to, float* s, Softmax& state) {
  static const ints kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  floats scores[kVectors], best = splat(state.top), sum{};
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; c++) {
    scores[c] = load16(s + c * kLanes) * p.scale;
    if (MASKED) {
      if (p.soft_cap != 0.f) scores[c] = p.soft_cap * fast_tanh(scores[c] / p.soft_cap);
      const ints key = kIota + int(c * kLanes);
      scores[c] = (key >= from) & (key < to) ? scores[c] : splat(kLowest);
    }
    best = larger(scores[c], best);
  }
  const float top = largest(best);
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; c++) {
    floats w = exp_below_88(scores[c] - top);
    if (MASKED) w = scores[c] == kLowest ? floats{} : w;
    sum += w;
    store16(s + c * kLanes, w);
  }
  const float shrink = fast_exp(state.top - top);
  state = {top, state.mass * shrink + total(sum)};
  return shrink;
}

// For the row at `position`, which sees keys up to itself, as far back as the window.
static inline float soften(const Paged& p, int64_t position, int64_t start, int64_t count, float* s, Softmax& state) {
  const int from = int(std::max<int64_t>(0, p.first_seen(position) - start));
  const int to = int(std::min(count, position + 1 - start));
  if (from >= to) {
    std::fill(s, s + kChunk, 0.f);
    return 1.f;
  }
  if (from == 0 && to == kChunk && p.soft_cap == 0.f) return soften<false>(p, from, to, s, state);
  return soften<true>(p, from, to, s, state);
}
