// Element types and small vector helpers shared by the CPU kernels. All arithmetic is in fp32.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

struct bf16 {
  uint16_t bits;
};

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) {
  uint32_t wide = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

static inline void store(float* p, float value) { *p = value; }
// Round to nearest even. The kernels produce no NaN from finite inputs; a NaN stays one.
static inline void store(bf16* p, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  uint32_t rounded = wide + 0x7fffu + ((wide >> 16) & 1u);
  bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
  p->bits = uint16_t((is_nan ? (wide | 0x400000u) : rounded) >> 16);
}

// exp for loops that the compiler vectorises: 2^n * e^r with |r| <= ln(2) / 2 and a polynomial for e^r
// (Cephes' expf coefficients, relative error about 1e-7). Below -87 it is 0.
static inline float fast_exp(float x) {
  float clamped = std::min(std::max(x, -87.f), 88.f);
  float n = std::nearbyint(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return x < -87.f ? 0.f : p * scale;
}

// Sixteen floats: one register of AVX-512, two of AVX2.
typedef float f16 __attribute__((vector_size(64)));
static const int64_t kLanes = 16;
static inline f16 load16(const float* p) {
  f16 v;
  std::memcpy(&v, p, 64);
  return v;
}
static inline void store16(float* p, f16 v) { std::memcpy(p, &v, 64); }
static inline void store16(bf16* p, f16 v) {
#if defined(__AVX512BF16__)
  __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &narrow, 32);
#else
  for (int i = 0; i < 16; i++) store(p + i, v[i]);
#endif
}

// The types that the Python side names: 0 is fp32, 1 is bf16.
#define DISPATCH(dtype, T, ...)     \
  if ((dtype) == 0) {               \
    using T = float;                \
    __VA_ARGS__;                    \
  } else {                          \
    using T = bf16;                 \
    __VA_ARGS__;                    \
  }
