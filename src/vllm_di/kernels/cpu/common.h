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

// The types that the Python side names: 0 is fp32, 1 is bf16.
#define DISPATCH(dtype, T, ...)     \
  if ((dtype) == 0) {               \
    using T = float;                \
    __VA_ARGS__;                    \
  } else {                          \
    using T = bf16;                 \
    __VA_ARGS__;                    \
  }
