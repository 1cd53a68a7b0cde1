// Norms, rotary embedding, gates, KV writes and argmax. Rows are shared out over threads only when there is work for them.
#include "common.h"

static const int64_t kSerial = 1 << 14;  // elements below which threads cost more than they bring

template <typename T>
static void norm_row(const T* x, const T* weight, T* out, int64_t n, float eps) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    float v = load(x + i);
    sum += v * v;
  }
  float scale = 1.f / std::sqrt(sum / float(n) + eps);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(out + i, load(x + i) * scale * load(weight + i));
}

// x: rows of n, `inner` rows lie `stride` apart within an outer row of `outer_stride`.
EXPORT void rms_norm(int dtype, const void* x, const void* weight, void* out, int64_t outer,
                     int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t n,
                     float eps, int threads) {
  DISPATCH(dtype, T, {
    const T* in = (const T*)x;
    T* to = (T*)out;
    _Pragma("omp parallel for if (outer * inner * n > kSerial) num_threads(threads)")
    for (int64_t r = 0; r < outer * inner; r++)
      norm_row(in + (r / inner) * outer_stride + (r % inner) * inner_stride, (const T*)weight,
               to + r * n, n, eps);
  })
}

// residual += x (rounded to T), out = rms_norm(residual).
EXPORT void add_rms_norm(int dtype, const void* x, void* residual, const void* weight, void* out,
                         int64_t rows, int64_t n, float eps, int threads) {
  DISPATCH(dtype, T, {
    const T* in = (const T*)x;
    T* sum = (T*)residual;
    T* to = (T*)out;
    _Pragma("omp parallel for if (rows * n > kSerial) num_threads(threads)")
    for (int64_t r = 0; r < rows; r++) {
      const T* a = in + r * n;
      T* b = sum + r * n;
      _Pragma("omp simd")
      for (int64_t i = 0; i < n; i++) store(b + i, load(a + i) + load(b + i));
      norm_row(b, (const T*)weight, to + r * n, n, eps);
    }
  })
}

template <typename T>
static void rotate_head(T* head, const float* cos, const float* sin, int64_t half,
                        bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < half; i++) {
      float a = load(head + 2 * i), b = load(head + 2 * i + 1);
      store(head + 2 * i, a * cos[i] - b * sin[i]);
      store(head + 2 * i + 1, b * cos[i] + a * sin[i]);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    float a = load(head + i), b = load(head + half + i);
    store(head + i, a * cos[i] - b * sin[i]);
    store(head + half + i, b * cos[i] + a * sin[i]);
  }
}

// q and k in place; cos_sin: [positions, 2 half] fp32, cosines then sines. Strides are in elements.
EXPORT void rotary_embedding(int dtype, const int64_t* positions, void* q, void* k,
                             const float* cos_sin, int64_t tokens, int64_t q_heads,
                             int64_t k_heads, int64_t q_stride, int64_t k_stride, int64_t head_size,
                             int64_t half, int interleaved, int threads) {
  DISPATCH(dtype, T, {
    _Pragma("omp parallel for if (tokens * (q_heads + k_heads) * head_size > kSerial) num_threads(threads)")
    for (int64_t t = 0; t < tokens; t++) {
      const float* cos = cos_sin + positions[t] * 2 * half;
      T* row = (T*)q + t * q_stride;
      for (int64_t h = 0; h < q_heads; h++)
        rotate_head(row + h * head_size, cos, cos + half, half, interleaved);
      row = (T*)k + t * k_stride;
      for (int64_t h = 0; h < k_heads; h++)
        rotate_head(row + h * head_size, cos, cos + half, half, interleaved);
    }
  })
}

static inline floats silu(floats x) { return x / (1.f + fast_exp(-x)); }
// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
static inline floats gelu_tanh(floats x) {
  return 0.5f * x * (1.f + fast_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// x: [rows, 2 n] -> out: [rows, n]. gelu: tanh form, else SiLU.
EXPORT void gate_and_mul(int dtype, int gelu, const void* x, void* out, int64_t rows, int64_t n,
                         int64_t stride, int threads) {
  DISPATCH(dtype, T, {
    _Pragma("omp parallel for if (rows * n > kSerial) num_threads(threads)")
    for (int64_t r = 0; r < rows; r++) {
      const T* gate = (const T*)x + r * stride;
      T* to = (T*)out + r * n;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        const floats v = load16(gate + i);
        store16(to + i, (gelu ? gelu_tanh(v) : silu(v)) * load16(gate + n + i));
      }
      if (i < n) {
        const floats v = load_some(gate + i, n - i);
        store_some(to + i, (gelu ? gelu_tanh(v) : silu(v)) * load_some(gate + n + i, n - i), n - i);
      }
    }
  })
}

// k, v: [tokens, heads, head_size] at their strides -> caches [blocks, heads, block_size, head_size].
EXPORT void write_kv(int64_t element, const char* k, const char* v, char* key_cache,
                     char* value_cache, const int64_t* slots, int64_t tokens, int64_t heads,
                     int64_t head_size, int64_t block_size, int64_t k_stride, int64_t v_stride) {
  int64_t bytes = head_size * element;
  for (int64_t t = 0; t < tokens; t++) {
    if (slots[t] < 0) continue;
    int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
    for (int64_t h = 0; h < heads; h++) {
      int64_t to = ((block * heads + h) * block_size + offset) * bytes;
      std::memcpy(key_cache + to, k + (t * k_stride + h * head_size) * element, bytes);
      std::memcpy(value_cache + to, v + (t * v_stride + h * head_size) * element, bytes);
    }
  }
}

// The first of the largest entries of each row, or its first NaN.
EXPORT void argmax(const float* logits, int64_t* out, int64_t rows, int64_t n, int64_t stride,
                   int threads) {
#pragma omp parallel for if (rows > 1) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const float* row = logits + r * stride;
    float best = -INFINITY;
    int strange = 0;
#pragma omp simd reduction(max : best) reduction(| : strange)
    for (int64_t i = 0; i < n; i++) {
      best = row[i] > best ? row[i] : best;
      strange |= row[i] != row[i];
    }
    int64_t at = 0;
    while (at < n - 1 && (strange ? row[at] == row[at] : row[at] != best)) at++;
    out[r] = at;
  }
}
