// Attention of many rows: chunks of keys and values are packed for the register tile, and tiles of rows pass over them.
#pragma once
#include <type_traits>

#include "attention.h"
#include "transpose.h"

// What tiles multiply: pairs of bf16 where the CPU has an instruction for them, else floats.
template <typename T>
struct Operand {
  typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  typedef uint32_t type;
};
#endif

static inline void pack_to(float* to, float value) { *to = value; }
static inline void pack_to(float* to, bf16 value) { *to = load(&value); }
static inline void pack_to(bf16* to, bf16 value) { *to = value; }

// A span of queries of one kv head. S: Operand; E: what an operand is made of; PER of them.
template <typename T>
struct Span {
  typedef typename Operand<T>::type S;
  typedef typename std::conditional<std::is_same<S, float>::value, float, bf16>::type E;
  static const int64_t PER = sizeof(S) / sizeof(E);
  static const int64_t kValueSteps = kChunk / PER;

  const Paged& p;
  int64_t d, q_steps, width;          // width: head_size in whole pairs of panels
  std::vector<E> q, keys, values;     // [rows, q_steps], pairs of panels [q_steps][2][16], [kValueSteps][2][16]
  std::vector<float> sums;            // [rows, width]
  std::vector<Softmax> states;

  explicit Span(const Paged& paged)
      : p(paged), d(p.head_size), q_steps((d + PER - 1) / PER), width((d + kPair - 1) / kPair * kPair) {}

  void pack(const Chunk<T>& chunk) {
    if (chunk.count < kChunk || d % kLanes) {  // the rest is multiplied by weights of 0
      std::fill(keys.begin(), keys.end(), E{});
      std::fill(values.begin(), values.end(), E{});
    }
    for (int64_t first = 0; first < chunk.count; first += kLanes) {
      S* to = (S*)keys.data() + first / kPair * q_steps * kPair + first % kPair;
      pack_keys(chunk.keys + first, std::min(kLanes, chunk.count - first), to);
    }
    for (int64_t j = 0; j < chunk.count; j += PER)
      for (int64_t i = 0; i < d; i += kLanes) {
        S* to = (S*)values.data() + (i / kPair * kValueSteps + j / PER) * kPair + i % kPair;
        pack_values(chunk.values + j, std::min(PER, chunk.count - j), i, std::min(kLanes, d - i), to);
      }
  }

  // Up to 16 keys: step by step, the keys side by side.
  void pack_keys(const T* const* from, int64_t count, S* to) const {
    int64_t step = 0;
#if defined(__AVX512F__)
    if (sizeof(T) == sizeof(E) && count == kLanes) {
      const uint32_t* rows[16];
      for (int i = 0; i < 16; i++) rows[i] = (const uint32_t*)from[i];
      for (; step + kLanes <= d / PER; step += kLanes) transpose(rows, step, (uint32_t*)to + step * kPair);
    }
#endif
    for (; step < q_steps; step++)
      for (int64_t lane = 0; lane < count; lane++)
        for (int64_t i = step * PER; i < std::min(d, (step + 1) * PER); i++)
          pack_to((E*)(to + step * kPair + lane) + i % PER, from[lane][i]);
  }

  // Elements [i, i + lanes) of PER values, side by side.
  void pack_values(const T* const* from, int64_t count, int64_t i, int64_t lanes, S* to) const {
    if (std::is_same<S, uint32_t>::value && count == 2 && lanes == kLanes) {
      halves a, b;
      std::memcpy(&a, from[0] + i, 32);
      std::memcpy(&b, from[1] + i, 32);
      const words both = __builtin_convertvector(a, words) | __builtin_convertvector(b, words) << 16;
      std::memcpy(to, &both, 64);
      return;
    }
    for (int64_t lane = 0; lane < lanes; lane++)
      for (int64_t j = 0; j < count; j++) pack_to((E*)(to + lane) + j, from[j][i + lane]);
  }

  void score(const S* rows, int64_t pair, float (&scores)[kTileRows][kChunk]) {
    floats part[kTileRows][2] = {};
    multiply<S, kTileRows>(part, rows, q_steps, (const S*)keys.data() + pair * q_steps * kPair, q_steps);
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < 2; c++) store16(scores[r] + pair * kPair + c * kLanes, part[r][c]);
  }

  void gather(const E (&weights)[kTileRows][kChunk], const float (&shrink)[kTileRows], int64_t row, int64_t pair,
              int64_t steps) {
    floats part[kTileRows][2];
    float* to = sums.data() + row * width + pair * kPair;
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < 2; c++) part[r][c] = load16(to + r * width + c * kLanes) * shrink[r];
    multiply<S, kTileRows>(part, (const S*)weights[0], kValueSteps, (const S*)values.data() + pair * kValueSteps * kPair,
                           steps);
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < 2; c++) store16(to + r * width + c * kLanes, part[r][c]);
  }

  void tile(const Chunk<T>& chunk, int64_t row, int64_t rows, int64_t position) {
    const int64_t group = p.group(), last = std::min(row + kTileRows, rows) - 1;
    if (position + last / group < chunk.start) return;  // no row sees any key of the chunk
    if (p.first_seen(position + row / group) >= chunk.start + chunk.count) return;
    alignas(64) float scores[kTileRows][kChunk];
    alignas(64) E weights[kTileRows][kChunk];
    float shrink[kTileRows];
    for (int64_t pair = 0; pair < kChunk / kPair; pair++) score((const S*)q.data() + row * q_steps, pair, scores);
    for (int r = 0; r < kTileRows; r++) {
      if (row + r > last) {  // a row that fills the tile
        shrink[r] = 0.f;
        std::fill(weights[r], weights[r] + kChunk, E{});
        continue;
      }
      shrink[r] = soften(p, position + (row + r) / group, chunk.start, chunk.count, scores[r], states[row + r]);
      for (int j = 0; j < kChunk; j += kLanes) store16(weights[r] + j, load16(scores[r] + j));
    }
    const int64_t steps = (chunk.count + PER - 1) / PER;
    for (int64_t pair = 0; pair < width / kPair; pair++) gather(weights, shrink, row, pair, steps);
  }

  // Queries [first, last) of a sequence.
  void run(int64_t seq, int64_t kv_head, int64_t first, int64_t last) {
    const int64_t rows = (last - first) * p.group(), position = p.offset(seq) + first;
    const int64_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows;
    keys.resize(size_t(kChunk * q_steps * PER));
    values.resize(size_t(kChunk * width));
    q.assign(size_t(padded * q_steps * PER), E{});
    sums.assign(size_t(padded * width), 0.f);
    states.assign(size_t(rows), Softmax{kLowest, 0.f});
    for (int64_t r = 0; r < rows; r++) {
      const T* from = (const T*)p.q + p.element(seq, kv_head, first, r, p.q_stride);
      for (int64_t i = 0; i < d; i++) pack_to(q.data() + r * q_steps * PER + i, from[i]);
    }
    const int64_t begin = p.first_seen(position), end = p.offset(seq) + last;
    for (int64_t start = begin; start < end; start += kChunk) {
      Chunk<T> chunk;
      chunk.find(p, seq, kv_head, start, end);
      pack(chunk);
      for (int64_t row = 0; row < rows; row += kTileRows) tile(chunk, row, rows, position);
    }
    for (int64_t r = 0; r < rows; r++) {
      T* to = (T*)p.out + p.element(seq, kv_head, first, r, p.heads * d);
      const float scale = 1.f / states[r].mass;
      const float* from = sums.data() + r * width;
      int64_t i = 0;
      for (; i + kLanes <= d; i += kLanes) store16(to + i, load16(from + i) * scale);
      for (; i < d; i++) store(to + i, from[i] * scale);
    }
  }
};

