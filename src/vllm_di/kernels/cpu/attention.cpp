// Causal attention over block tables, with a running softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al.
// 2022). Caches are [blocks, kv_heads, block_size, head_size]. A piece of work is one kv head of one sequence and a span of its
// queries; all query heads of the kv head share the keys and values that were loaded.
#include "common.h"

struct Paged {
  const void *q, *keys, *values;
  void* out;
  const int32_t *query_start, *seq_lens, *block_table;
  int64_t seqs, heads, kv_heads, head_size, block_size, table_stride, q_stride;
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window;         // 0: none
};

static const int64_t kSpan = 32;      // query positions in a piece of work
static const float kLowest = -1e30f;  // below any score; no infinities, so that fast math is safe

// scores [ROWS, bs] = q [ROWS, d] times keys [d, bs]; bs is a multiple of 32.
template <int ROWS>
static void multiply_keys(const float* q, const float* keys, float* scores, int64_t d, int64_t bs) {
  for (int64_t j = 0; j < bs; j += 2 * kLanes) {
    f16 sums[ROWS][2] = {};
    for (int64_t i = 0; i < d; i++) {
      const f16 a = load16(keys + i * bs + j), b = load16(keys + i * bs + j + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        sums[r][0] += q[r * d + i] * a;
        sums[r][1] += q[r * d + i] * b;
      }
    }
    for (int r = 0; r < ROWS; r++) {
      store16(scores + r * bs + j, sums[r][0]);
      store16(scores + r * bs + j + kLanes, sums[r][1]);
    }
  }
}

// sum [ROWS, d] += weights [ROWS, bs] times values [count, d], WIDTH vectors of d at a time.
template <int ROWS, int WIDTH>
static void multiply_values(const float* weights, const float* values, float* sum, int64_t d,
                            int64_t bs, int64_t count, int64_t at) {
  f16 sums[ROWS][WIDTH];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < WIDTH; c++) sums[r][c] = load16(sum + r * d + at + c * kLanes);
  for (int64_t j = 0; j < count; j++) {
#pragma GCC unroll 4
    for (int c = 0; c < WIDTH; c++) {
      const f16 v = load16(values + j * d + at + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sums[r][c] += weights[r * bs + j] * v;
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < WIDTH; c++) store16(sum + r * d + at + c * kLanes, sums[r][c]);
}

template <int ROWS>
static void tile_values(const float* weights, const float* values, float* sum, int64_t d, int64_t bs,
                        int64_t count) {
  int64_t at = 0;
  for (; at + 4 * kLanes <= d; at += 4 * kLanes)
    multiply_values<ROWS, 4>(weights, values, sum, d, bs, count, at);
  for (; at < d; at += kLanes) multiply_values<ROWS, 1>(weights, values, sum, d, bs, count, at);
}

// What one row needs of one block: the keys it sees are [from, to) of the block.
struct Row {
  int64_t from, to;
};

static inline Row visible(const Paged& p, int64_t position, int64_t start, int64_t count) {
  int64_t from = p.window ? std::max<int64_t>(0, position - p.window + 1 - start) : 0;
  return {from, std::min(count, position + 1 - start)};
}

// The running softmax: scores become weights, the row's sum so far is scaled down. Weights outside [from, to) are 0.
static void soften(const Paged& p, float* s, Row seen, int64_t bs, float* o, int64_t d, float& top,
                   float& mass) {
  if (seen.from >= seen.to) {
    std::fill(s, s + bs, 0.f);
    return;
  }
  if (p.soft_cap != 0.f)
    for (int64_t j = seen.from; j < seen.to; j++) s[j] = p.soft_cap * std::tanh(s[j] / p.soft_cap);
  float best = top;
#pragma omp simd reduction(max : best)
  for (int64_t j = seen.from; j < seen.to; j++) best = s[j] > best ? s[j] : best;
  const float shrink = fast_exp(top - best);
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = seen.from; j < seen.to; j++) {
    s[j] = fast_exp(s[j] - best);
    total += s[j];
  }
  std::fill(s, s + seen.from, 0.f);
  std::fill(s + seen.to, s + bs, 0.f);
  mass = mass * shrink + total;
  top = best;
  if (shrink != 1.f)
#pragma omp simd
    for (int64_t i = 0; i < d; i++) o[i] *= shrink;
}

template <typename T>
static void piece(const Paged& p, int64_t seq, int64_t kv_head, int64_t first, int64_t last,
                  std::vector<float>& scratch) {
  const int64_t d = p.head_size, group = p.heads / p.kv_heads, bs = p.block_size;
  const int64_t length = p.seq_lens[seq], queries = p.query_start[seq + 1] - p.query_start[seq];
  const int64_t offset = length - queries;  // position of the first query
  const int64_t rows = (last - first) * group;
  scratch.resize(size_t(rows * (2 * d + 2 + bs) + 2 * bs * d));
  float* q = scratch.data();         // [rows, d], scaled
  float* sum = q + rows * d;         // [rows, d]
  float* top = sum + rows * d;       // [rows] largest score so far
  float* mass = top + rows;          // [rows]
  float* scores = mass + rows;       // [rows, bs]
  float* keys = scores + rows * bs;  // [d, bs] for tiles, [bs, d] for few rows
  float* values = keys + bs * d;     // [bs, d]
  for (int64_t r = 0; r < rows; r++) {
    const T* from = (const T*)p.q + (p.query_start[seq] + first + r / group) * p.q_stride +
                    (kv_head * group + r % group) * d;
    for (int64_t i = 0; i < d; i++) q[r * d + i] = load(from + i) * p.scale;
    top[r] = kLowest;
    mass[r] = 0.f;
  }
  std::fill(sum, sum + rows * d, 0.f);
  const bool tiled = rows > 6 && bs % (2 * kLanes) == 0 && d % kLanes == 0;
  const int64_t begin = p.window ? std::max<int64_t>(0, offset + first - p.window + 1) : 0;
  const int64_t end = offset + last;  // keys that the last query sees
  for (int64_t block = begin / bs; block * bs < end; block++) {
    const int64_t start = block * bs, count = std::min(bs, end - start);
    const int64_t id = p.block_table[seq * p.table_stride + block];
    const T* k = (const T*)p.keys + (id * p.kv_heads + kv_head) * bs * d;
    const T* v = (const T*)p.values + (id * p.kv_heads + kv_head) * bs * d;
#pragma omp simd
    for (int64_t i = 0; i < count * d; i++) values[i] = load(v + i);
    if (tiled) {
      for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < d; i++) keys[i * bs + j] = load(k + j * d + i);
      if (count < bs)  // the rest of the block may hold anything
        for (int64_t i = 0; i < d; i++) std::fill(keys + i * bs + count, keys + (i + 1) * bs, 0.f);
      int64_t r = 0;
      for (; r + 6 <= rows; r += 6) multiply_keys<6>(q + r * d, keys, scores + r * bs, d, bs);
      for (; r < rows; r++) multiply_keys<1>(q + r * d, keys, scores + r * bs, d, bs);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count * d; i++) keys[i] = load(k + i);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < count; j++) {
          float dot = 0.f;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < d; i++) dot += q[r * d + i] * keys[j * d + i];
          scores[r * bs + j] = dot;
        }
    }
    for (int64_t r = 0; r < rows; r++) {
      const Row seen = visible(p, offset + first + r / group, start, count);
      soften(p, scores + r * bs, seen, bs, sum + r * d, d, top[r], mass[r]);
    }
    int64_t r = 0;
    if (d % kLanes == 0) {
      for (; r + 6 <= rows; r += 6)
        tile_values<6>(scores + r * bs, values, sum + r * d, d, bs, count);
      for (; r + 3 <= rows; r += 3)
        tile_values<3>(scores + r * bs, values, sum + r * d, d, bs, count);
      for (; r < rows; r++) tile_values<1>(scores + r * bs, values, sum + r * d, d, bs, count);
    }
    for (; r < rows; r++)
      for (int64_t j = 0; j < count; j++)
#pragma omp simd
        for (int64_t i = 0; i < d; i++) sum[r * d + i] += scores[r * bs + j] * values[j * d + i];
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t token = p.query_start[seq] + first + r / group;
    T* to = (T*)p.out + (token * p.heads + kv_head * group + r % group) * d;
    const float scale = mass[r] > 0.f ? 1.f / mass[r] : 0.f;
    for (int64_t i = 0; i < d; i++) store(to + i, sum[r * d + i] * scale);
  }
}

EXPORT void paged_attention(int dtype, const void* q, const void* keys, const void* values,
                            void* out, const int32_t* query_start, const int32_t* seq_lens,
                            const int32_t* block_table, int64_t seqs, int64_t heads,
                            int64_t kv_heads, int64_t head_size, int64_t block_size,
                            int64_t table_stride, int64_t q_stride, float scale, float soft_cap,
                            int64_t window, int threads) {
  Paged p{q, keys, values, out, query_start, seq_lens, block_table, seqs, heads, kv_heads,
          head_size, block_size, table_stride, q_stride, scale, soft_cap, window};
  struct Item {
    int32_t seq, kv_head, first, last;
  };
  std::vector<Item> items;
  for (int64_t s = 0; s < seqs; s++) {
    const int32_t queries = query_start[s + 1] - query_start[s];
    // the last spans have the most keys: they go first
    for (int32_t first = (queries - 1) / kSpan * kSpan; first >= 0 && queries > 0; first -= kSpan)
      for (int32_t h = 0; h < kv_heads; h++)
        items.push_back({int32_t(s), h, first, std::min(queries, int32_t(first + kSpan))});
  }
#pragma omp parallel num_threads(threads) if (items.size() > 1)
  {
    static thread_local std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) {
      const Item& it = items[i];
      DISPATCH(dtype, T, piece<T>(p, it.seq, it.kv_head, it.first, it.last, scratch))
    }
  }
}
