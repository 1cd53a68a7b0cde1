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
  float* keys = scores + rows * bs;  // [d, bs] transposed, or [bs, d] for few rows
  float* values = keys + bs * d;     // [bs, d]
  for (int64_t r = 0; r < rows; r++) {
    const T* from = (const T*)p.q + (p.query_start[seq] + first + r / group) * p.q_stride +
                    (kv_head * group + r % group) * d;
    for (int64_t i = 0; i < d; i++) q[r * d + i] = load(from + i) * p.scale;
    top[r] = kLowest;
    mass[r] = 0.f;
  }
  std::fill(sum, sum + rows * d, 0.f);
  const bool few = rows <= 6;
  const int64_t begin = p.window ? std::max<int64_t>(0, offset + first - p.window + 1) : 0;
  const int64_t end = offset + last;  // keys that the last query sees
  for (int64_t block = begin / bs; block * bs < end; block++) {
    const int64_t start = block * bs, count = std::min(bs, end - start);
    const int64_t at = (int64_t(p.block_table[seq * p.table_stride + block]) * p.kv_heads + kv_head) * bs * d;
    const T* k = (const T*)p.keys + at;
    const T* v = (const T*)p.values + at;
#pragma omp simd
    for (int64_t i = 0; i < count * d; i++) values[i] = load(v + i);
    if (few) {
#pragma omp simd
      for (int64_t i = 0; i < count * d; i++) keys[i] = load(k + i);
    } else {
      for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < d; i++) keys[i * bs + j] = load(k + j * d + i);
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t position = offset + first + r / group;
      const int64_t from = p.window ? std::max<int64_t>(0, position - p.window + 1 - start) : 0;
      const int64_t to = std::min(count, position + 1 - start);
      if (from >= to) continue;
      float* s = scores + r * bs;
      const float* qr = q + r * d;
      if (few) {
        for (int64_t j = from; j < to; j++) {
          float dot = 0.f;
          const float* kr = keys + j * d;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < d; i++) dot += qr[i] * kr[i];
          s[j] = dot;
        }
      } else {
        std::fill(s, s + to, 0.f);
        for (int64_t i = 0; i < d; i++) {
          const float qi = qr[i];
          const float* kr = keys + i * bs;
#pragma omp simd
          for (int64_t j = 0; j < to; j++) s[j] += qi * kr[j];
        }
      }
      if (p.soft_cap != 0.f)
        for (int64_t j = from; j < to; j++) s[j] = p.soft_cap * std::tanh(s[j] / p.soft_cap);
      float best = top[r];
#pragma omp simd reduction(max : best)
      for (int64_t j = from; j < to; j++) best = s[j] > best ? s[j] : best;
      const float shrink = std::exp(top[r] - best);
      top[r] = best;
      float total = 0.f;
#pragma omp simd reduction(+ : total)
      for (int64_t j = from; j < to; j++) {
        s[j] = std::exp(s[j] - best);
        total += s[j];
      }
      mass[r] = mass[r] * shrink + total;
      float* o = sum + r * d;
      if (shrink != 1.f)
#pragma omp simd
        for (int64_t i = 0; i < d; i++) o[i] *= shrink;
      for (int64_t j = from; j < to; j++) {
        const float weight = s[j];
        const float* vr = values + j * d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) o[i] += weight * vr[i];
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    T* to = (T*)p.out + ((p.query_start[seq] + first + r / group) * p.heads + kv_head * group + r % group) * d;
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
