// Element types and small vector helpers shared by the CPU kernels. All arithmetic is in fp32.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)  // isa=neon; isa=generic has NEON too, by the compiler alone
#include <arm_neon.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

struct bf16 {
  uint16_t bits;
};

static inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) { return from_bits(uint32_t(p->bits) << 16); }

static inline void store(float* p, float value) { *p = value; }
// Rounds to nearest even; a NaN stays one.
static inline void store(bf16* p, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  uint32_t rounded = wide + 0x7fffu + ((wide >> 16) & 1u);
  bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
  p->bits = uint16_t((is_nan ? (wide | 0x400000u) : rounded) >> 16);
}

// Sixteen lanes: one register of AVX-512, two of AVX2, four of SSE2 or NEON.
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
static const int64_t kLanes = 16;

#if defined(__ARM_FEATURE_DOTPROD)
// What each of sixteen lanes' four registers of NEON becomes: each(register, 0 to 3).
template <typename Register, typename V, typename Each>
static inline __attribute__((always_inline)) V by_registers(V v, const Each& each) {
  Register parts[4];
  std::memcpy(parts, &v, 64);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) parts[i] = each(parts[i], i);
  std::memcpy(&v, parts, 64);
  return v;
}
#endif

static inline floats splat(float value) { return floats{} + value; }
static inline floats load16(const float* p) {
  floats v;
  std::memcpy(&v, p, 64);
  return v;
}
static inline floats load16(const bf16* p) {
  halves narrow;
  std::memcpy(&narrow, p, 32);
  return (floats)(__builtin_convertvector(narrow, words) << 16);
}
// Sixteen pairs of bf16: the even elements and the odd ones.
static inline void load_pairs(const void* p, floats& even, floats& odd) {
  words w;
  std::memcpy(&w, p, 64);
  even = (floats)(w << 16);
  odd = (floats)(w & 0xffff0000u);
}
static inline void store16(float* p, floats v) { std::memcpy(p, &v, 64); }
static inline void store16(bf16* p, floats v) {
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  float32x4_t wide[4];
  std::memcpy(wide, &v, 64);
  bfloat16x8_t narrow[2];
  for (int i = 0; i < 2; i++) narrow[i] = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(wide[2 * i]), wide[2 * i + 1]);
#else
  const words w = (words)v, rounded = w + 0x7fffu + ((w >> 16) & 1u);
  const halves narrow = __builtin_convertvector((v != v ? (w | 0x400000u) : rounded) >> 16, halves);
#endif
  std::memcpy(p, &narrow, 32);
}
#if defined(__AVX512F__)
static inline float largest(floats v) { return _mm512_reduce_max_ps((__m512)v); }
static inline float total(floats v) { return _mm512_reduce_add_ps((__m512)v); }
static inline int32_t total(ints v) { return _mm512_reduce_add_epi32((__m512i)v); }
#elif defined(__ARM_FEATURE_DOTPROD)
static inline float largest(floats v) {
  float32x4_t q[4];
  std::memcpy(q, &v, 64);
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(q[0], q[1]), vmaxq_f32(q[2], q[3])));
}
static inline float total(floats v) {
  float32x4_t q[4];
  std::memcpy(q, &v, 64);
  return vaddvq_f32((q[0] + q[1]) + (q[2] + q[3]));
}
static inline int32_t total(ints v) {
  int32x4_t q[4];
  std::memcpy(q, &v, 64);
  return vaddvq_s32((q[0] + q[1]) + (q[2] + q[3]));
}
#else
static inline float largest(floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = std::max(best, v[i]);
  return best;
}
static inline float total(floats v) {
  float sum = 0.f;
  for (int i = 0; i < kLanes; i++) sum += v[i];
  return sum;
}
static inline int32_t total(ints v) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; i++) sum += v[i];
  return sum;
}
#endif
// The first `count` lanes alone, for the end of a row; the others are 0.
template <typename T>
static inline floats load_some(const T* p, int64_t count) {
  floats v{};
  for (int64_t i = 0; i < count; i++) v[i] = load(p + i);
  return v;
}
template <typename T>
static inline void store_some(T* p, floats v, int64_t count) {
  for (int64_t i = 0; i < count; i++) store(p + i, v[i]);
}

// e^r for |r| <= ln(2) / 2.
static inline floats exp_rest(floats r) {
  floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.f;
}

// The larger of each; a NaN of b stays one.
static inline floats larger(floats a, floats b) {
#if defined(__AVX512F__)
  return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
static inline floats smaller(floats a, floats b) {
#if defined(__AVX512F__)
  return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// exp: 2^n * e^r with |r| <= ln(2) / 2 and a polynomial for e^r (Cephes' expf coefficients, relative error about 1e-7), for
// x <= 88. What is below -87 is held there, where the result is a normal number; a NaN stays one. Adding 1.5 * 2^23 rounds
// to a whole number, in the low bits.
static inline floats exp_below_88(floats x) {
  const floats kRound = splat(12582912.f);
  x = larger(splat(-87.f), x);
  const floats t = x * 1.44269504088896341f + kRound, n = t - kRound;
  const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
#if defined(__AVX512F__)
  return (floats)_mm512_scalef_ps((__m512)exp_rest(r), (__m512)n);
#else
  return exp_rest(r) * (floats)(((ints)t - (ints)kRound + 127) << 23);
#endif
}
// The same for any x: what is above 88 is held there.
static inline floats fast_exp(floats x) { return exp_below_88(smaller(splat(88.f), x)); }
static inline float fast_exp(float x) { return fast_exp(splat(x))[0]; }

// 1 / x for normal numbers, to about 1e-7.
static inline floats inverse(floats x) {
#if defined(__AVX512F__)
  const floats near = (floats)_mm512_rcp14_ps((__m512)x);
  return near * (2.f - x * near);
#else
  return 1.f / x;
#endif
}

// tanh(x) from exp, absolute error about 1e-7.
static inline floats fast_tanh(floats x) { return 1.f - 2.f * inverse(fast_exp(2.f * x) + 1.f); }

static inline floats silu(floats x) { return x * inverse(1.f + fast_exp(-x)); }
// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
static inline floats gelu_tanh(floats x) {
  return 0.5f * x * (1.f + fast_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// For a thread that spins: what runs beside it on its core gets on.
static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
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
