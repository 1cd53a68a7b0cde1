// Attention of many rows: chunks of keys and values are packed for the register tile, and tiles of rows pass over them.
#pragma once
#include <type_traits>

#include "attention.h"
#include "tiles.h"
#include "transpose.h"

// Two ways to multiply kRows rows of operands S by a pair of panels of as many steps, a multiple of kStep. `add` makes `to`
// [kRows][32], `to_stride` apart, into shrunk `to` + rows times panels; without `shrink` it begins at 0.

// By the register tile of all dense products.
template <typename Operand>
struct ByRegisters {
  typedef Operand S;
  static const int kRows = kTileRows;
  static const int64_t kStep = 1;

  static void begin() {}
  static void end() {}
  static void add(float* to, int64_t to_stride, const float* shrink, const S* rows, int64_t stride, const S* panels,
                  int64_t steps, int64_t) {
    floats part[kRows][2] = {};
    if (shrink)
      for (int r = 0; r < kRows; r++)
        for (int c = 0; c < 2; c++) part[r][c] = load16(to + r * to_stride + c * kLanes) * shrink[r];
    multiply<S, kRows>(part, rows, stride, panels, steps);
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < 2; c++) store16(to + r * to_stride + c * kLanes, part[r][c]);
  }
};

#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
// By tile registers, from pairs of bf16. `count` rows of them there are: the others are left out by sixteens.
struct ByTiles {
  typedef uint32_t S;
  static const int kRows = kBlockRows;
  static const int64_t kStep = kTileWidth;

  static void begin() { tile_config(); }
  static void end() { tile_release(); }
  static void add(float* to, int64_t to_stride, const float* shrink, const S* rows, int64_t stride, const S* panels,
                  int64_t steps, int64_t count) {
    const bool both = count > kTileHeight;
    if (shrink) {
      for (int64_t r = 0; r < (both ? kRows : kTileHeight); r++)
        for (int c = 0; c < 2; c++) {
          float* at = to + r * to_stride + c * kLanes;
          store16(at, load16(at) * shrink[r]);
        }
      block_load(to, 4 * to_stride);
    } else {
      block_zero();
    }
    const S* lower = rows + kTileHeight * stride;
    for (int64_t k = 0; k < steps; k += kTileWidth)
      block_add<DotBf16>(rows + k, lower + k, both, 4 * stride, panels + k * kPair);
    block_store(to, 4 * to_stride);
  }
};
#endif

// Without tile registers: pairs of bf16 where the CPU has an instruction for them, else floats.
template <typename T>
struct Operand {
  typedef float type;
};
#if defined(DOT_OF_PAIRS)
template <>
struct Operand<bf16> {
  typedef uint32_t type;
};
#endif

static inline void pack_to(float* to, float value) { *to = value; }
static inline void pack_to(float* to, bf16 value) { *to = load(&value); }
static inline void pack_to(bf16* to, bf16 value) { *to = value; }

// A span of queries of one kv head. By: ByRegisters or ByTiles; E: what an operand is made of; PER of them.
template <typename T, typename By>
struct Span {
  typedef typename By::S S;
  typedef typename std::conditional<std::is_same<S, float>::value, float, bf16>::type E;
  static const int64_t PER = sizeof(S) / sizeof(E);
  static const int64_t kValueSteps = kChunk / PER;

  static int64_t whole(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

  const Paged& p;
  int64_t d, q_steps, width;          // the head size, in whole steps and in whole pairs of panels
  std::vector<E> q, keys, values;     // [rows, q_steps], pairs of panels [q_steps][2][16], [kValueSteps][2][16]
  std::vector<float> sums;            // [rows, width]
  std::vector<Softmax> states;

  explicit Span(const Paged& paged)
      : p(paged), d(p.head_size), q_steps(whole((d + PER - 1) / PER, By::kStep)), width(whole(d, kPair)) {}

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

  void tile(const Chunk<T>& chunk, int64_t row, int64_t rows, int64_t position) {
    const int64_t group = p.group(), last = std::min(row + By::kRows, rows) - 1;
    if (position + last / group < chunk.start) return;  // no row sees any key of the chunk
    if (p.first_seen(position + row / group) >= chunk.start + chunk.count) return;
    alignas(64) float scores[By::kRows][kChunk];
    alignas(64) E weights[By::kRows][kChunk];
    float shrink[By::kRows];
    const S *k = (const S*)keys.data(), *v = (const S*)values.data();
    const int64_t seen = std::min(chunk.count, position + last / group + 1 - chunk.start);  // keys that any row may see
    for (int64_t pair = 0; pair * kPair < seen; pair++)
      By::add(scores[0] + pair * kPair, kChunk, nullptr, (const S*)q.data() + row * q_steps, q_steps,
              k + pair * q_steps * kPair, q_steps, last - row + 1);
    static const int kFew = By::kRows < 4 ? By::kRows : 4;
    for (int r = 0; r < By::kRows; r += kFew)
      soften<kFew>(p, row + r, last - row - r + 1, position, chunk.start, chunk.count, scores + r, weights + r,
                   states.data() + row + r, shrink + r);
    const int64_t steps = whole((seen + PER - 1) / PER, By::kStep);
    for (int64_t pair = 0; pair < width / kPair; pair++)
      By::add(sums.data() + row * width + pair * kPair, width, shrink, (const S*)weights[0], kValueSteps,
              v + pair * kValueSteps * kPair, steps, last - row + 1);
  }

  // Of the second-level cache, which they come to while tiles are multiplied.
  void ask(const T* key, const T* value) const {
    for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(key + i, 0, 2);
      __builtin_prefetch(value + i, 0, 2);
    }
  }

  // Queries [first, last) of a sequence.
  void run(int64_t seq, int64_t kv_head, int64_t first, int64_t last) {
    const int64_t rows = (last - first) * p.group(), position = p.offset(seq) + first;
    const int64_t padded = whole(rows, By::kRows);
    keys.resize(size_t(kChunk * q_steps * PER));
    values.resize(size_t(kChunk * width));
    q.assign(size_t(padded * q_steps * PER), E{});
    sums.assign(size_t(padded * width), 0.f);
    states.assign(size_t(padded), Softmax{kLowest, 0.f});
    for (int64_t r = 0; r < rows; r++) {
      const T* from = (const T*)p.q + p.element(seq, kv_head, first, r, p.q_stride);
      for (int64_t i = 0; i < d; i++) pack_to(q.data() + r * q_steps * PER + i, from[i]);
    }
    const int64_t begin = p.first_seen(position), end = p.offset(seq) + last, tiles = padded / By::kRows;
    Chunk<T> chunks[2], *here = &chunks[0], *next = &chunks[1];
    here->find(p, seq, kv_head, begin, end);
    for (int64_t start = begin; start < end; start += kChunk, std::swap(here, next)) {
      next->find(p, seq, kv_head, std::min(start + kChunk, end), end);
      pack(*here);
      for (int64_t t = 0; t < tiles; t++) {
        tile(*here, t * By::kRows, rows, position);
        for (int64_t j = next->count * t / tiles; j < next->count * (t + 1) / tiles; j++) ask(next->keys[j], next->values[j]);
      }
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

