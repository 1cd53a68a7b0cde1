// Causal attention over block tables, with a running softmax over chunks of keys (Milakov and Gimelshein 2018; Dao et al.
// 2022). Caches are [blocks, kv_heads, block_size, head_size]. All query heads of a kv head share the keys and values that
// were loaded. There are two ways:
//
//   many rows (prefill): a piece of work is one kv head of one sequence and a span of its queries. A chunk of keys and values
//   is packed for the register tile (tile.h), and tiles of rows pass over it.
//   few rows (decode): a piece is one kv head of one sequence and a span of its keys, read once and straight from the cache;
//   the pieces' softmaxes are merged at the end.
//
// The way, the spans and the order of sums depend on the sequence alone: its result does not depend on the batch.
#include <type_traits>

#include "tile.h"

static const int64_t kChunk = 64;         // keys that are scored at a time
static const int kVectors = kChunk / kLanes;
static const int64_t kFewRows = 8;        // rows up to which keys are read straight from the cache
static const int64_t kKeySpan = 512;      // few rows: keys of a piece of work
static const int64_t kRowSpan = 96;       // many rows: rows of a piece of work
static const int64_t kSerial = 1 << 15;   // multiplications below which threads cost more than they bring
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

static inline float largest(floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = std::max(best, v[i]);
  return best;
}
static inline float sum(floats v) {
  float total = 0.f;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

// What a row has seen so far.
struct Softmax {
  float top, mass;  // largest score; sum of exp(score - top)
};

// Keys [start, start + count) of one kv head of a sequence, where they lie.
template <typename T>
struct Chunk {
  int64_t start, count;
  const T *keys[kChunk], *values[kChunk];

  Chunk(const Paged& p, int64_t seq, int64_t kv_head, int64_t from, int64_t end)
      : start(from), count(std::min(kChunk, end - from)) {
    const int32_t* table = p.block_table + seq * p.table_stride;
    int64_t block = from / p.block_size, slot = from % p.block_size;
    for (int64_t j = 0; j < count;) {
      const int64_t at = (table[block++] * p.kv_heads + kv_head) * p.block_size;
      for (; slot < p.block_size && j < count; slot++, j++) {
        keys[j] = (const T*)p.keys + (at + slot) * p.head_size;
        values[j] = (const T*)p.values + (at + slot) * p.head_size;
      }
      slot = 0;
    }
    for (int64_t j = count; j % 4; j++) keys[j] = keys[count - 1];  // scored in fours, then masked
  }

  // Ask memory for entries [j, j + 4), which are wanted soon.
  void prefetch(int64_t j, int64_t d) const {
    const int64_t line = 64 / int64_t(sizeof(T));
    for (const int64_t last = std::min(j + 4, count); j < last; j++)
      for (int64_t i = 0; i < d; i += line) {
        __builtin_prefetch(keys[j] + i);
        __builtin_prefetch(values[j] + i);
      }
  }
};

// Raw scores [kChunk] of the row at `position` become weights, those of keys that it does not see 0. Returns by how much the
// sums so far shrink.
static float soften(const Paged& p, int64_t position, int64_t start, int64_t count, float* s, Softmax& state) {
  static const ints kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int from = int(std::max<int64_t>(0, p.first_seen(position) - start));
  const int to = int(std::min(count, position + 1 - start));
  if (from >= to) {
    std::fill(s, s + kChunk, 0.f);
    return 1.f;
  }
  floats scores[kVectors], best = splat(state.top), total{};
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; c++) {
    floats v = load16(s + c * kLanes) * p.scale;
    if (p.soft_cap != 0.f) v = p.soft_cap * fast_tanh(v / p.soft_cap);
    const ints key = kIota + int(c * kLanes);
    scores[c] = (key >= from) & (key < to) ? v : splat(kLowest);
    best = scores[c] > best ? scores[c] : best;
  }
  const float top = largest(best);
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; c++) {
    floats w = fast_exp(scores[c] - top);
    w = scores[c] > kLowest ? w : floats{};
    total += w;
    store16(s + c * kLanes, w);
  }
  const float shrink = fast_exp(state.top - top);
  state = {top, state.mass * shrink + sum(total)};
  return shrink;
}

// ---- many rows ----------------------------------------------------------------------------------

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
  int64_t d, q_steps, panels, width;  // panels of head_size; width: head_size in whole panels
  std::vector<E> q, keys, values;     // [rows, q_steps], [panels of kChunk][q_steps][16], [panels][kValueSteps][16]
  std::vector<float> sums;            // [rows, width]
  std::vector<Softmax> states;

  explicit Span(const Paged& paged)
      : p(paged), d(p.head_size), q_steps((d + PER - 1) / PER), panels((d + kLanes - 1) / kLanes),
        width(panels * kLanes) {}

  void pack(const Chunk<T>& chunk) {
    if (chunk.count < kChunk || d % kLanes) {  // the rest is multiplied by weights of 0
      std::fill(keys.begin(), keys.end(), E{});
      std::fill(values.begin(), values.end(), E{});
    }
    const int64_t whole = d / PER;
    for (int64_t panel = 0; panel * kLanes < chunk.count; panel++) {
      const int64_t lanes = std::min(kLanes, chunk.count - panel * kLanes);
      S* to = (S*)keys.data() + panel * q_steps * kLanes;
      for (int64_t lane = 0; lane < lanes; lane++) {
        const T* from = chunk.keys[panel * kLanes + lane];
        if (sizeof(T) == sizeof(E)) {
          for (int64_t k = 0; k < whole; k++) std::memcpy(to + k * kLanes + lane, from + k * PER, sizeof(S));
          for (int64_t i = whole * PER; i < d; i++) pack_to((E*)(to + whole * kLanes + lane), from[i]);
        } else {
          for (int64_t i = 0; i < d; i++) pack_to((E*)to + i * kLanes + lane, from[i]);
        }
      }
    }
    for (int64_t j = 0; j < chunk.count; j++) {
      const T* from = chunk.values[j];
      E* to = values.data() + (j / PER) * kLanes * PER + j % PER;
      for (int64_t i = 0; i < d; i += kLanes) {
        E* panel = to + i / kLanes * kChunk * kLanes;
        const int64_t lanes = std::min(kLanes, d - i);
        for (int64_t lane = 0; lane < lanes; lane++) pack_to(panel + lane * PER, from[i + lane]);
      }
    }
  }

  template <int PANELS>
  void score(const S* rows, int64_t panel, float (&scores)[kTileRows][kChunk]) {
    floats sums[kTileRows][PANELS] = {};
    multiply<S, kTileRows, PANELS>(sums, rows, q_steps, (const S*)keys.data() + panel * q_steps * kLanes,
                                   q_steps * kLanes, q_steps);
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < PANELS; c++) store16(scores[r] + (panel + c) * kLanes, sums[r][c]);
  }

  template <int PANELS>
  void gather(const E (&weights)[kTileRows][kChunk], const float (&shrink)[kTileRows], int64_t row, int64_t panel,
              int64_t steps) {
    floats part[kTileRows][PANELS];
    float* to = sums.data() + row * width + panel * kLanes;
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < PANELS; c++) part[r][c] = load16(to + r * width + c * kLanes) * shrink[r];
    multiply<S, kTileRows, PANELS>(part, (const S*)weights[0], kValueSteps,
                                   (const S*)values.data() + panel * kValueSteps * kLanes, kValueSteps * kLanes,
                                   steps);
    for (int r = 0; r < kTileRows; r++)
      for (int c = 0; c < PANELS; c++) store16(to + r * width + c * kLanes, part[r][c]);
  }

  void tile(const Chunk<T>& chunk, int64_t row, int64_t rows, int64_t position) {
    const int64_t group = p.group(), last = std::min(row + kTileRows, rows) - 1;
    if (position + last / group < chunk.start) return;  // no row sees any key of the chunk
    if (p.first_seen(position + row / group) >= chunk.start + chunk.count) return;
    alignas(64) float scores[kTileRows][kChunk];
    alignas(64) E weights[kTileRows][kChunk];
    float shrink[kTileRows];
    for (int64_t c = 0; c < kChunk / kLanes; c += kTilePanels)
      score<kTilePanels>((const S*)q.data() + row * q_steps, c, scores);
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
    int64_t panel = 0;
    for (; panel + kTilePanels <= panels; panel += kTilePanels)
      gather<kTilePanels>(weights, shrink, row, panel, steps);
    for (; panel < panels; panel++) gather<1>(weights, shrink, row, panel, steps);
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
      const Chunk<T> chunk(p, seq, kv_head, start, end);
      pack(chunk);
      for (int64_t row = 0; row < rows; row += kTileRows) tile(chunk, row, rows, position);
    }
    for (int64_t r = 0; r < rows; r++) {
      T* to = (T*)p.out + p.element(seq, kv_head, first, r, p.heads * d);
      const float scale = 1.f / states[r].mass;
      for (int64_t i = 0; i < d; i++) store(to + i, sums[r * width + i] * scale);
    }
  }
};

// ---- few rows -----------------------------------------------------------------------------------

#if defined(__AVX512F__)
// The sums of four vectors.
static inline __m128 sum_lanes(const floats (&v)[4]) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], e = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 ce = _mm512_add_ps(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, ce, 0x44), _mm512_shuffle_ps(ab, ce, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
static inline void store_sums(float* to, const floats (&v)[4]) { _mm_storeu_ps(to, sum_lanes(v)); }
#else
static inline void store_sums(float* to, const floats (&v)[4]) {
  for (int j = 0; j < 4; j++) {
    float sum = 0.f;
    for (int i = 0; i < kLanes; i++) sum += v[j][i];
    to[j] = sum;
  }
}
#endif

// sum += a[:32] * b[:32], lane by lane.
static inline floats dot_step(floats sum, const float* a, const float* b) {
  sum += load16(a) * load16(b);
  return sum + load16(a + kLanes) * load16(b + kLanes);
}
static inline floats dot_step(floats sum, const bf16* a, const bf16* b) {
#if defined(__AVX512BF16__)
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
  floats a_even, a_odd, b_even, b_odd;
  load_pairs(a, a_even, a_odd);
  load_pairs(b, b_even, b_odd);
  sum += a_even * b_even;
  return sum + a_odd * b_odd;
#endif
}

// Two vectors of 32 values. Of bf16 the even elements come first; unpermute() undoes it.
static inline void load32(const float* p, floats& a, floats& b) {
  a = load16(p);
  b = load16(p + kLanes);
}
static inline void load32(const bf16* p, floats& a, floats& b) { load_pairs(p, a, b); }
static inline int64_t unpermute(const float*, int64_t i) { return i; }
static inline int64_t unpermute(const bf16*, int64_t i) { return i / 32 * 32 + (i % 2) * kLanes + i % 32 / 2; }

// Scores of ROWS rows, for keys four at a time.
template <typename T, int ROWS>
static void score_rows(const T* const* q, const Chunk<T>& chunk, const Chunk<T>& next, int64_t d,
                       float (*scores)[kChunk]) {
  for (int64_t j = 0; j < chunk.count; j += 4) {
    next.prefetch(j, d);
    floats sums[ROWS][4] = {};
    for (int64_t i = 0; i < d; i += 32)
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) sums[r][c] = dot_step(sums[r][c], q[r] + i, chunk.keys[j + c] + i);
    for (int r = 0; r < ROWS; r++) store_sums(scores[r] + j, sums[r]);
  }
}

// sums of ROWS rows = sums * shrink + weights times values, at WIDTH * 32 of the head.
template <typename T, int ROWS, int WIDTH>
static void gather_rows(const float (*weights)[kChunk], const float* shrink, const Chunk<T>& chunk, int64_t d,
                        int64_t at, float* sums) {
  floats part[ROWS][2 * WIDTH];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < 2 * WIDTH; c++) part[r][c] = load16(sums + r * d + at + c * kLanes) * shrink[r];
  for (int64_t j = 0; j < chunk.count; j++) {
#pragma GCC unroll 2
    for (int c = 0; c < WIDTH; c++) {
      floats a, b;
      load32(chunk.values[j] + at + c * 32, a, b);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        part[r][2 * c] += weights[r][j] * a;
        part[r][2 * c + 1] += weights[r][j] * b;
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < 2 * WIDTH; c++) store16(sums + r * d + at + c * kLanes, part[r][c]);
}

template <typename T, int ROWS>
static void few_rows(const Paged& p, const T* const* q, int64_t position, int64_t row, const Chunk<T>& chunk,
                     const Chunk<T>& next, Softmax* states, float* sums) {
  alignas(64) float scores[ROWS][kChunk];
  float shrink[ROWS];
  score_rows<T, ROWS>(q, chunk, next, p.head_size, scores);
  for (int r = 0; r < ROWS; r++)
    shrink[r] = soften(p, position + (row + r) / p.group(), chunk.start, chunk.count, scores[r], states[r]);
  int64_t at = 0;
  for (; at + 64 <= p.head_size; at += 64)
    gather_rows<T, ROWS, 2>(scores, shrink, chunk, p.head_size, at, sums);
  for (; at < p.head_size; at += 32) gather_rows<T, ROWS, 1>(scores, shrink, chunk, p.head_size, at, sums);
}

// Keys [begin, end), all queries of a sequence -> states [rows], sums [rows, head_size].
template <typename T>
static void key_span(const Paged& p, int64_t seq, int64_t kv_head, int64_t begin, int64_t end, Softmax* states,
                     float* sums) {
  const int64_t rows = p.queries(seq) * p.group(), position = p.offset(seq), d = p.head_size;
  const T* q[kFewRows];
  for (int64_t r = 0; r < rows; r++) {
    q[r] = (const T*)p.q + p.element(seq, kv_head, 0, r, p.q_stride);
    states[r] = {kLowest, 0.f};
  }
  std::fill(sums, sums + rows * d, 0.f);
  Chunk<T> chunk(p, seq, kv_head, begin, end);
  for (int64_t start = begin; start < end; start += kChunk) {
    const Chunk<T> next(p, seq, kv_head, std::min(start + kChunk, end - 1), end);
    for (int64_t r = 0; r < rows;) {
      switch (std::min<int64_t>(rows - r, 4)) {
        case 1: few_rows<T, 1>(p, q + r, position, r, chunk, next, states + r, sums + r * d); r += 1; break;
        case 2: few_rows<T, 2>(p, q + r, position, r, chunk, next, states + r, sums + r * d); r += 2; break;
        case 3: few_rows<T, 3>(p, q + r, position, r, chunk, next, states + r, sums + r * d); r += 3; break;
        default: few_rows<T, 4>(p, q + r, position, r, chunk, next, states + r, sums + r * d); r += 4; break;
      }
    }
    chunk = next;
  }
}

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
      const float scale = fast_exp(part.top - all.top);
      all.mass += part.mass * scale;
#pragma omp simd
      for (int64_t i = 0; i < d; i++) sums[i] = n ? sums[i] + sums[n * size + i] * scale : sums[i] * scale;
    }
    T* to = (T*)p.out + p.element(seq, kv_head, 0, r, p.heads * d);
    const float scale = 1.f / all.mass;
    for (int64_t i = 0; i < d; i++) store(to + i, sums[unpermute(to, i)] * scale);
  }
}

// ---- the call -----------------------------------------------------------------------------------

struct Item {
  int32_t seq, kv_head, first, last;  // queries of a span of many rows, or keys of a span of few
  int64_t part;                       // few rows: where in the workspace; many: -1
};
struct Merge {
  int32_t seq, kv_head;
  int64_t count, part;
};

template <typename T>
static void attend(const Paged& p, int threads) {
  static thread_local std::vector<Item> items;
  static thread_local std::vector<Merge> merges;
  static thread_local std::vector<float> workspace;
  items.clear();
  merges.clear();
  int64_t used = 0, work = 0;
  const int32_t step = int32_t(std::max<int64_t>(1, kRowSpan / p.group()));
  for (int32_t s = 0; s < p.seqs; s++) {
    const int32_t queries = int32_t(p.queries(s)), length = p.seq_lens[s];
    const int64_t rows = queries * p.group();
    work += rows * p.kv_heads * length * p.head_size;
    if (rows > kFewRows || p.head_size % 32) {
      // the last spans have the most keys: they go first
      for (int32_t first = (queries - 1) / step * step; first >= 0 && queries > 0; first -= step)
        for (int32_t h = 0; h < p.kv_heads; h++)
          items.push_back({s, h, first, std::min(queries, first + step), -1});
    } else if (rows > 0) {
      const int32_t begin = int32_t(p.first_seen(p.offset(s)));
      for (int32_t h = 0; h < p.kv_heads; h++) {
        merges.push_back({s, h, 0, used});
        for (int32_t from = begin; from < length; from += kKeySpan, merges.back().count++) {
          items.push_back({s, h, from, std::min(length, from + int32_t(kKeySpan)), used});
          used += rows * (2 + p.head_size);
        }
      }
    }
  }
  if (int64_t(workspace.size()) < used) workspace.resize(size_t(used));
  const Item* all = items.data();
  const Merge* ends = merges.data();
  float* parts = workspace.data();
  const int64_t num_items = int64_t(items.size()), num_merges = int64_t(merges.size());
#pragma omp parallel num_threads(threads) if (work > kSerial)
  {
    Span<T> span(p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_items; i++) {
      const Item& it = all[i];
      if (it.part < 0) {
        span.run(it.seq, it.kv_head, it.first, it.last);
      } else {
        Softmax* states = (Softmax*)(parts + it.part);
        key_span<T>(p, it.seq, it.kv_head, it.first, it.last, states,
                    parts + it.part + 2 * p.queries(it.seq) * p.group());
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_merges; i++)
      merge<T>(p, ends[i].seq, ends[i].kv_head, ends[i].count, parts + ends[i].part);
  }
}

// q: [tokens, heads, head_size], rows q_stride apart. Rows beyond the last query are padding: their output is 0.
EXPORT void paged_attention(int dtype, const void* q, const void* keys, const void* values, void* out,
                            const int32_t* query_start, const int32_t* seq_lens, const int32_t* block_table,
                            int64_t tokens, int64_t seqs, int64_t heads, int64_t kv_heads, int64_t head_size,
                            int64_t block_size, int64_t table_stride, int64_t q_stride, float scale, float soft_cap,
                            int64_t window, int threads) {
  const Paged p{q, keys, values, out, query_start, seq_lens, block_table, seqs, heads, kv_heads,
                head_size, block_size, table_stride, q_stride, scale, soft_cap, window};
  DISPATCH(dtype, T, {
    const int64_t row = heads * head_size, last = query_start[seqs];
    std::memset((T*)out + last * row, 0, size_t((tokens - last) * row) * sizeof(T));
    attend<T>(p, threads);
  })
}
