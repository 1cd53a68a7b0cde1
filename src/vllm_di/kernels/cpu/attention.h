// What both ways of attention share: where keys and values lie, and the running softmax.
#pragma once
#include <type_traits>

#include "tile.h"

static const int64_t kChunk = 64;         // keys that are scored at a time
static const int kVectors = kChunk / kLanes;
static const float kLog2E = 1.44269504f;
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
  float top, mass;  // the largest score times log2(e); the sum of exp(score - largest)
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
    for (int64_t j = count; count && j % 4; j++) {  // taken in fours, then masked
      keys[j] = keys[count - 1];
      values[j] = values[count - 1];
    }
  }
};

// 2^x for x <= 127, relative error about 1e-7. A polynomial of degree 5 for [-1/2, 1/2], 1 at 0 and fitted to the least
// relative error (by Lawson's weights). What is below -150 gives 0, or 2^-126 without AVX-512; a NaN stays one.
static inline floats exp2_below_127(floats x) {
#if defined(__AVX512F__)
  x = larger(splat(-150.f), x);
  const floats n = (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
#else
  const floats kRound = splat(12582912.f);
  x = larger(splat(-126.f), x);
  const floats t = x + kRound, n = t - kRound, r = x - n;
#endif
  floats p = splat(1.326472404e-3f);
  p = p * r + 9.671512865e-3f;
  p = p * r + 5.550733754e-2f;
  p = p * r + 2.402224208e-1f;
  p = p * r + 6.931469776e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (floats)(((ints)t - (ints)kRound + 127) << 23);
#endif
}

#if defined(__AVX512F__)
// Each of four vectors folded to one number.
template <typename Fold>
static inline void fold_lanes(float* to, const floats (&v)[4], const Fold& fold) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], e = (__m512)v[3];
  const __m512 ab = fold(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 ce = fold(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e));
  __m512 all = fold(_mm512_shuffle_ps(ab, ce, 0x44), _mm512_shuffle_ps(ab, ce, 0xee));
  all = fold(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  all = fold(all, _mm512_shuffle_f32x4(all, all, 0xb1));
  _mm_storeu_ps(to, _mm512_castps512_ps128(all));
}
static inline void totals(float* to, const floats (&v)[4]) {
  fold_lanes(to, v, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
}
static inline void largest_of(float* to, const floats (&v)[4]) {
  fold_lanes(to, v, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
}
#else
static inline void totals(float* to, const floats (&v)[4]) {
  for (int i = 0; i < 4; i++) to[i] = total(v[i]);
}
static inline void largest_of(float* to, const floats (&v)[4]) {
  for (int i = 0; i < 4; i++) to[i] = largest(v[i]);
}
#endif

// Scores of ROWS rows, before their scale, become weights; those outside [from, to) 0. `shrink`: by how much a row's sums so
// far do.
template <bool MASKED, int ROWS, typename W>
static inline void soften(const Paged& p, const int* from, const int* to, const float (*s)[kChunk], W (*weights)[kChunk],
                          Softmax* states, float* shrink) {
  static const ints kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float scale = p.scale * kLog2E;
  floats scores[ROWS][kVectors], most[4] = {}, sums[4] = {};
  alignas(16) float tops[4], more[4];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    most[r] = splat(states[r].top);
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; c++) {
      scores[r][c] = load16(s[r] + c * kLanes) * scale;
      if (MASKED) {
        if (p.soft_cap != 0.f)
          scores[r][c] = p.soft_cap * kLog2E * fast_tanh(scores[r][c] * (1.f / (p.soft_cap * kLog2E)));
        const ints key = kIota + int(c * kLanes);
        scores[r][c] = (key >= from[r]) & (key < to[r]) ? scores[r][c] : splat(kLowest);
      }
      most[r] = larger(scores[r][c], most[r]);
    }
  }
  largest_of(tops, most);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; c++) {
      floats w = exp2_below_127(scores[r][c] - tops[r]);
      if (MASKED) w = scores[r][c] == kLowest ? floats{} : w;
      sums[r] += w;
      store16(weights[r] + c * kLanes, w);
    }
  totals(more, sums);
  floats less{};
  for (int r = 0; r < ROWS; r++) less[r] = states[r].top - tops[r];
  less = exp2_below_127(less);
  for (int r = 0; r < ROWS; r++) {
    shrink[r] = less[r];
    states[r] = {tops[r], states[r].mass * less[r] + more[r]};
  }
}

// For up to four rows of a group's queries, the first at row `row` of those that begin at `position`; each sees keys up to
// itself, as far back as the window. `left`: rows that there are; the others see nothing.
template <int ROWS, typename W>
static inline void soften(const Paged& p, int64_t row, int64_t left, int64_t position, int64_t start, int64_t count,
                          const float (*s)[kChunk], W (*weights)[kChunk], Softmax* states, float* shrink) {
  int from[ROWS], to[ROWS];
  bool masked = p.soft_cap != 0.f;
  for (int r = 0; r < ROWS; r++) {
    const int64_t at = position + (row + r) / p.group();
    from[r] = int(std::max<int64_t>(0, p.first_seen(at) - start));
    to[r] = r < left ? int(std::min(count, at + 1 - start)) : 0;
    masked |= from[r] > 0 || to[r] < kChunk;
  }
  if (masked)
    soften<true, ROWS>(p, from, to, s, weights, states, shrink);
  else
    soften<false, ROWS>(p, from, to, s, weights, states, shrink);
}
