// Attention of few rows: keys and values are read once and straight from the cache, and what comes next is asked for meanwhile.
#pragma once
#include "attention.h"

static const int64_t kFewRows = 8;  // rows up to which this way is taken

// sum += a[:32] * b[:32], lane by lane.
static inline floats dot_step(floats sum, const float* a, const float* b) {
  sum += load16(a) * load16(b);
  return sum + load16(a + kLanes) * load16(b + kLanes);
}
static inline floats dot_step(floats sum, const bf16* a, const bf16* b) {
#if defined(__AVX512BF16__)
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return by_registers<float32x4_t>(sum, [&](float32x4_t part, int i) {
    const auto eight = [i](const bf16* from) { return vreinterpretq_bf16_u16(vld1q_u16(&from[8 * i].bits)); };
    return vbfdotq_f32(part, eight(a), eight(b));
  });
#else
  floats a_even, a_odd, b_even, b_odd;
  load_pairs(a, a_even, a_odd);
  load_pairs(b, b_even, b_odd);
  sum += a_even * b_even;
  return sum + a_odd * b_odd;
#endif
}

// Weighted sums of values, 32 elements of the head at a time as two vectors, for four keys at a time. The weights are T.
template <int ROWS>
static inline void add_values(floats (&sums)[ROWS][2], const float* const* values, const float (*weights)[kChunk],
                              int64_t j, int64_t at) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const floats a = load16(values[j + c] + at), b = load16(values[j + c] + at + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      sums[r][0] += weights[r][j + c] * a;
      sums[r][1] += weights[r][j + c] * b;
    }
  }
}
#if defined(__AVX512BF16__)
// A pair of keys at a time: their values side by side, their weights in one word.
template <int ROWS>
static inline void add_values(floats (&sums)[ROWS][2], const bf16* const* values, const bf16 (*weights)[kChunk],
                              int64_t j, int64_t at) {
#pragma GCC unroll 2
  for (int c = 0; c < 4; c += 2) {
    const __m512i a = _mm512_loadu_si512(values[j + c] + at), b = _mm512_loadu_si512(values[j + c + 1] + at);
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      int pair;
      std::memcpy(&pair, &weights[r][j + c], 4);
      const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = (floats)_mm512_dpbf16_ps((__m512)sums[r][0], w, low);
      sums[r][1] = (floats)_mm512_dpbf16_ps((__m512)sums[r][1], w, high);
    }
  }
}
// Where element i of the head stands among the sums.
static inline int64_t place(const bf16*, int64_t i) { return i / 32 * 32 + i % 8 / 4 * kLanes + i % 32 / 8 * 4 + i % 4; }
typedef bf16 WeightOfBf16;
#else
template <int ROWS>
static inline void add_values(floats (&sums)[ROWS][2], const bf16* const* values, const float (*weights)[kChunk],
                              int64_t j, int64_t at) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    floats even, odd;
    load_pairs(values[j + c] + at, even, odd);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      sums[r][0] += weights[r][j + c] * even;
      sums[r][1] += weights[r][j + c] * odd;
    }
  }
}
static inline int64_t place(const bf16*, int64_t i) { return i / 32 * 32 + i % 2 * kLanes + i % 32 / 2; }
typedef float WeightOfBf16;
#endif
static inline int64_t place(const float*, int64_t i) { return i; }

// One kv head of a sequence and a span of its keys.
template <typename T>
struct KeySpan {
  const Paged& p;
  const int64_t seq, kv_head, rows, position, d;
  typedef typename std::conditional<std::is_same<T, float>::value, float, WeightOfBf16>::type W;

  KeySpan(const Paged& paged, int64_t s, int64_t h)
      : p(paged), seq(s), kv_head(h), rows(p.queries(s) * p.group()), position(p.offset(s)), d(p.head_size) {}

  // `sums` [rows, d] and `states` [rows], of keys [begin, end). `here` is the first chunk of them; `find_next` finds in
  // `there` what this thread takes after the last one. Both are swapped on the way: at the end `here` is that chunk.
  template <typename Find>
  void run(int64_t begin, int64_t end, Softmax* states, float* sums, Chunk<T>*& here, Chunk<T>*& there,
           const Find& find_next) const {
    const T* q[kFewRows];
    for (int64_t r = 0; r < rows; r++) {
      q[r] = (const T*)p.q + p.element(seq, kv_head, 0, r, p.q_stride);
      states[r] = {kLowest, 0.f};
    }
    std::fill(sums, sums + rows * d, 0.f);
    for (int64_t start = begin; start < end; start += kChunk) {
      if (start + kChunk < end)
        there->find(p, seq, kv_head, start + kChunk, end);
      else
        find_next(*there);
      for (int64_t r = 0; r < rows; r += 4) {
        switch (std::min<int64_t>(rows - r, 4)) {
          case 1: chunk<1>(q + r, r, *here, *there, states + r, sums + r * d); break;
          case 2: chunk<2>(q + r, r, *here, *there, states + r, sums + r * d); break;
          case 3: chunk<3>(q + r, r, *here, *there, states + r, sums + r * d); break;
          default: chunk<4>(q + r, r, *here, *there, states + r, sums + r * d); break;
        }
      }
      std::swap(here, there);
    }
  }

  template <int ROWS>
  void chunk(const T* const* q, int64_t row, const Chunk<T>& here, const Chunk<T>& next, Softmax* states,
             float* sums) const {
    alignas(64) float scores[ROWS][kChunk];
    alignas(64) W weights[ROWS][kChunk];
    float shrink[ROWS];
    for (int64_t j = 0; j < here.count; j += 4) {
      ask(next.keys, 2 * j, next.count);
      floats dots[ROWS][4] = {};
      for (int64_t i = 0; i < d; i += 32)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++)
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; r++) dots[r][c] = dot_step(dots[r][c], q[r] + i, here.keys[j + c] + i);
      for (int r = 0; r < ROWS; r++) totals(scores[r] + j, dots[r]);
    }
    soften<ROWS>(p, row, ROWS, position, here.start, here.count, scores, weights, states, shrink);
    int64_t at = 0;
    for (; at + 64 <= d; at += 64) gather<ROWS, 2>(weights, shrink, here, next, at, sums);
    for (; at < d; at += 32) gather<ROWS, 1>(weights, shrink, here, next, at, sums);
  }

  // sums = sums * shrink + weights times values, at WIDTH times 32 elements of the head.
  template <int ROWS, int WIDTH>
  void gather(const W (*weights)[kChunk], const float* shrink, const Chunk<T>& here, const Chunk<T>& next, int64_t at,
              float* sums) const {
    floats part[WIDTH][ROWS][2];
    for (int w = 0; w < WIDTH; w++)
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) part[w][r][c] = load16(sums + r * d + at + w * 32 + c * kLanes) * shrink[r];
    for (int64_t j = 0; j < here.count; j += 4) {
      if (at == 0) ask(next.values, 2 * j, next.count);
#pragma GCC unroll 2
      for (int w = 0; w < WIDTH; w++) add_values<ROWS>(part[w], here.values, weights, j, at + w * 32);
    }
    for (int w = 0; w < WIDTH; w++)
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) store16(sums + r * d + at + w * 32 + c * kLanes, part[w][r][c]);
  }

  // Prefetch entries [j, j + 8) as far as the second-level cache: what is wanted next would crowd out the first. Asked for
  // at twice the pace, for the chunk may be the shorter one.
  void ask(const T* const* entries, int64_t j, int64_t count) const {
    for (const int64_t last = std::min(j + 8, count); j < last; j++)
      for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(entries[j] + i, 0, 1);
  }
};

// Merge what `count` spans of keys found, each [states of all rows][sums of all rows] in `parts`.
template <typename T>
static void merge(const Paged& p, int64_t seq, int64_t kv_head, int64_t count, float* parts) {
  const int64_t rows = p.queries(seq) * p.group(), d = p.head_size, size = rows * (2 + d);
  for (int64_t r = 0; r < rows; r++) {
    Softmax all{kLowest, 0.f};
    for (int64_t n = 0; n < count; n++) all.top = std::max(all.top, ((const Softmax*)(parts + n * size))[r].top);
    float* sums = parts + 2 * rows + r * d;
    for (int64_t n = 0; n < count; n++) {
      const Softmax part = ((const Softmax*)(parts + n * size))[r];
      const float scale = exp2_below_127(splat(part.top - all.top))[0];
      all.mass += part.mass * scale;
#pragma omp simd
      for (int64_t i = 0; i < d; i++) sums[i] = n ? sums[i] + sums[n * size + i] * scale : sums[i] * scale;
    }
    T* to = (T*)p.out + p.element(seq, kv_head, 0, r, p.heads * d);
    const float scale = 1.f / all.mass;
    for (int64_t i = 0; i < d; i++) store(to + i, sums[place(to, i)] * scale);
  }
}

