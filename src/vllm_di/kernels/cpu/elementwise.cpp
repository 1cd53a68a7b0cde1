// Norms, rotary embedding, gates, embedding, KV writes and argmax.
#include "task.h"

template <typename T>
static void norm_row(const T* x, const T* weight, T* out, int64_t n, float eps) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    float v = load(x + i);
    sum += v * v;
  }
  const float scale = 1.f / std::sqrt(sum / float(n) + eps);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store16(out + i, load16(x + i) * scale * load16(weight + i));
  for (; i < n; i++) store(out + i, load(x + i) * scale * load(weight + i));
}

template <typename T>
struct RmsNorm {
  const T *x, *weight;
  T* out;
  int64_t outer, inner, outer_stride, inner_stride, n;
  float eps;
  int64_t work() const { return outer * inner * n; }
  void run(const Team& team) const {
    for (int64_t r = team.first(outer * inner); r < team.last(outer * inner); r++)
      norm_row(x + r / inner * outer_stride + r % inner * inner_stride, weight, out + r * n, n, eps);
  }
};

// x: rows of n, `inner` rows lie `inner_stride` apart within an outer row of `outer_stride`.
EXPORT void rms_norm(int dtype, const void* x, const void* weight, void* out, int64_t outer, int64_t inner,
                     int64_t outer_stride, int64_t inner_stride, int64_t n, float eps, int threads) {
  DISPATCH(dtype, T, {
    submit(RmsNorm<T>{(const T*)x, (const T*)weight, (T*)out, outer, inner, outer_stride, inner_stride, n, eps},
           threads);
  })
}

// residual += x (rounded to T), out = rms_norm(residual).
template <typename T>
struct AddRmsNorm {
  const T* x;
  T* residual;
  const T* weight;
  T* out;
  int64_t rows, n;
  float eps;
  int64_t work() const { return rows * n; }
  void run(const Team& team) const {
    for (int64_t r = team.first(rows); r < team.last(rows); r++) {
      const T* a = x + r * n;
      T* b = residual + r * n;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store16(b + i, load16(a + i) + load16(b + i));
      for (; i < n; i++) store(b + i, load(a + i) + load(b + i));
      norm_row(b, weight, out + r * n, n, eps);
    }
  }
};

EXPORT void add_rms_norm(int dtype, const void* x, void* residual, const void* weight, void* out, int64_t rows,
                         int64_t n, float eps, int threads) {
  DISPATCH(dtype, T, {
    submit(AddRmsNorm<T>{(const T*)x, (T*)residual, (const T*)weight, (T*)out, rows, n, eps}, threads);
  })
}

// A head from one place to another, or to where it is. Of its `size` elements the first 2 half are rotated.
template <typename T>
static void rotate_head(const T* from, T* to, const float* cos, const float* sin, int64_t half, int64_t size,
                        bool interleaved) {
  if (from != to) std::memcpy(to + 2 * half, from + 2 * half, size_t(size - 2 * half) * sizeof(T));
  if (interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const float a = load(from + 2 * i), b = load(from + 2 * i + 1);
      store(to + 2 * i, a * cos[i] - b * sin[i]);
      store(to + 2 * i + 1, b * cos[i] + a * sin[i]);
    }
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const floats a = load16(from + i), b = load16(from + half + i), c = load16(cos + i), s = load16(sin + i);
    store16(to + i, a * c - b * s);
    store16(to + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = load(from + i), b = load(from + half + i);
    store(to + i, a * cos[i] - b * sin[i]);
    store(to + half + i, b * cos[i] + a * sin[i]);
  }
}

struct Angles {
  const int64_t* positions;
  const float* cos_sin;
  int64_t half;
  bool interleaved;
  // Token t's heads, which lie side by side.
  template <typename T>
  void rotate(T* heads, int64_t t, int64_t count, int64_t size) const {
    for (int64_t h = 0; h < count; h++) rotate_to(heads + h * size, heads + h * size, t, size);
  }
  template <typename T>
  void rotate_to(const T* from, T* to, int64_t t, int64_t size) const {
    const float* cos = cos_sin + positions[t] * 2 * half;
    rotate_head(from, to, cos, cos + half, half, size, interleaved);
  }
};

template <typename T>
struct Rotary {
  Angles angles;
  T *q, *k;
  int64_t tokens, q_heads, k_heads, q_stride, k_stride, head_size;
  int64_t work() const { return tokens * (q_heads + k_heads) * head_size; }
  void run(const Team& team) const {
    for (int64_t t = team.first(tokens); t < team.last(tokens); t++) {
      angles.rotate(q + t * q_stride, t, q_heads, head_size);
      angles.rotate(k + t * k_stride, t, k_heads, head_size);
    }
  }
};

// q and k in place; cos_sin: [positions, 2 half] fp32, cosines then sines. Strides are in elements.
EXPORT void rotary_embedding(int dtype, const int64_t* positions, void* q, void* k, const float* cos_sin,
                             int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t q_stride, int64_t k_stride,
                             int64_t head_size, int64_t half, int interleaved, int threads) {
  const Angles angles{positions, cos_sin, half, interleaved != 0};
  DISPATCH(dtype, T, {
    submit(Rotary<T>{angles, (T*)q, (T*)k, tokens, q_heads, k_heads, q_stride, k_stride, head_size}, threads);
  })
}

template <typename T>
struct GateAndMul {
  const T* x;
  T* out;
  int64_t rows, n, stride;
  bool gelu;
  int64_t work() const { return 4 * rows * n; }
  void run(const Team& team) const {
    const int64_t runs = (n + kRun - 1) / kRun;  // one row alone is shared out too
    for (int64_t piece = team.first(rows * runs); piece < team.last(rows * runs); piece++) {
      const int64_t r = piece / runs, end = std::min(n, (piece % runs + 1) * kRun);
      const T* gate = x + r * stride;
      T* to = out + r * n;
      int64_t i = piece % runs * kRun;
      for (; i + kLanes <= end; i += kLanes) {
        const floats v = load16(gate + i);
        store16(to + i, (gelu ? gelu_tanh(v) : silu(v)) * load16(gate + n + i));
      }
      if (i < end) {
        const floats v = load_some(gate + i, end - i);
        store_some(to + i, (gelu ? gelu_tanh(v) : silu(v)) * load_some(gate + n + i, end - i), end - i);
      }
    }
  }
  static const int64_t kRun = 256;
};

// x: [rows, 2 n] -> out: [rows, n]. gelu: tanh form, else SiLU.
EXPORT void gate_and_mul(int dtype, int gelu, const void* x, void* out, int64_t rows, int64_t n, int64_t stride,
                         int threads) {
  DISPATCH(dtype, T, { submit(GateAndMul<T>{(const T*)x, (T*)out, rows, n, stride, gelu != 0}, threads); })
}

// Where a slot's heads lie in a cache [blocks, heads, block_size, head_size].
struct Slots {
  const int64_t* slots;
  int64_t heads, block_size;
  bool drops(int64_t t) const { return slots[t] < 0; }
  // In head sizes from the start of the cache.
  int64_t row(int64_t t, int64_t head) const {
    return (slots[t] / block_size * heads + head) * block_size + slots[t] % block_size;
  }
};

struct WriteKv {
  Slots slots;
  const char *k, *v;
  char *key_cache, *value_cache;
  int64_t tokens, bytes, k_stride, v_stride;  // of a head; strides in bytes
  int64_t work() const { return tokens * slots.heads * bytes; }
  void run(const Team& team) const {
    for (int64_t t = team.first(tokens); t < team.last(tokens); t++) {
      if (slots.drops(t)) continue;
      for (int64_t h = 0; h < slots.heads; h++) {
        const int64_t to = slots.row(t, h) * bytes;
        std::memcpy(key_cache + to, k + t * k_stride + h * bytes, size_t(bytes));
        std::memcpy(value_cache + to, v + t * v_stride + h * bytes, size_t(bytes));
      }
    }
  }
};

// k, v: [tokens, heads, head_size] at their strides -> caches [blocks, heads, block_size, head_size].
EXPORT void write_kv(int64_t element, const char* k, const char* v, char* key_cache, char* value_cache,
                     const int64_t* slots, int64_t tokens, int64_t heads, int64_t head_size, int64_t block_size,
                     int64_t k_stride, int64_t v_stride, int threads) {
  submit(WriteKv{Slots{slots, heads, block_size}, k, v, key_cache, value_cache, tokens, head_size * element,
                 k_stride * element, v_stride * element},
         threads);
}

// Rotary embedding whose keys go straight into the cache.
template <typename T>
struct RotaryWriteKv {
  Angles angles;
  Slots slots;
  T* q;
  const T *k, *v;
  T *key_cache, *value_cache;
  int64_t tokens, q_heads, q_stride, k_stride, v_stride, head_size;
  int64_t work() const { return tokens * (q_heads + 2 * slots.heads) * head_size; }
  void run(const Team& team) const {
    for (int64_t t = team.first(tokens); t < team.last(tokens); t++) {
      angles.rotate(q + t * q_stride, t, q_heads, head_size);
      if (slots.drops(t)) continue;
      for (int64_t h = 0; h < slots.heads; h++) {
        const int64_t to = slots.row(t, h) * head_size, from = h * head_size;
        angles.rotate_to(k + t * k_stride + from, key_cache + to, t, head_size);
        std::memcpy(value_cache + to, v + t * v_stride + from, size_t(head_size) * sizeof(T));
      }
    }
  }
};

// q in place; k stays as it is. The other arguments: as in rotary_embedding and write_kv.
EXPORT void rotary_write_kv(int dtype, const int64_t* positions, void* q, const void* k, const void* v,
                            const float* cos_sin, void* key_cache, void* value_cache, const int64_t* slots,
                            int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t q_stride, int64_t k_stride,
                            int64_t v_stride, int64_t head_size, int64_t half, int64_t block_size, int interleaved,
                            int threads) {
  const Angles angles{positions, cos_sin, half, interleaved != 0};
  const Slots to{slots, k_heads, block_size};
  DISPATCH(dtype, T, {
    submit(RotaryWriteKv<T>{angles, to, (T*)q, (const T*)k, (const T*)v, (T*)key_cache, (T*)value_cache, tokens,
                            q_heads, q_stride, k_stride, v_stride, head_size},
           threads);
  })
}

// Rows of a table [rows, bytes].
struct Embedding {
  const int64_t* ids;
  const char* table;
  char* out;
  int64_t tokens, bytes;
  int64_t work() const { return tokens * bytes; }
  void run(const Team& team) const {
    for (int64_t t = team.first(tokens); t < team.last(tokens); t++)
      std::memcpy(out + t * bytes, table + ids[t] * bytes, size_t(bytes));
  }
};

EXPORT void embedding(const int64_t* ids, const char* table, char* out, int64_t tokens, int64_t bytes, int threads) {
  submit(Embedding{ids, table, out, tokens, bytes}, threads);
}

// The first of the largest entries of each row; -1 where that is not finite, or one is NaN.
struct Argmax {
  const float* logits;
  int64_t* out;
  int64_t rows, n, stride;
  int64_t work() const { return rows > 1 ? rows * n : 0; }
  void run(const Team& team) const {
    for (int64_t r = team.first(rows); r < team.last(rows); r++) out[r] = first_best(logits + r * stride);
  }

  static const int64_t kStretch = 512;  // the place is looked for in the one stretch that has the largest entry
  int64_t first_best(const float* row) const {
    float best = -INFINITY;
    int64_t best_start = 0;
    int strange = 0;
    for (int64_t start = 0; start < n; start += kStretch) {
      const int64_t end = std::min(start + kStretch, n);
      float peak = -INFINITY;
#pragma omp simd reduction(max : peak) reduction(| : strange)
      for (int64_t i = start; i < end; i++) {
        peak = row[i] > peak ? row[i] : peak;
        strange |= row[i] != row[i];
      }
      if (peak > best) best = peak, best_start = start;
    }
    if (strange || !std::isfinite(best)) return -1;
    while (row[best_start] != best) best_start++;
    return best_start;
  }
};

EXPORT void argmax(const float* logits, int64_t* out, int64_t rows, int64_t n, int64_t stride, int threads) {
  submit(Argmax{logits, out, rows, n, stride}, threads);
}
