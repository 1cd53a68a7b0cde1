// The register tile of all dense products: ROWS rows of x times two panels of 16 outputs.
//
// An operand is a float, a pair of bf16 or four bytes. A panel holds the operands of 16 outputs: one step is one float along
// k, a pair of bf16 or four bytes. Two panels lie side by side, [steps][2][16], so that few rows read one stream of memory. One
// instruction of AVX512-BF16 or VNNI (BFDOT or USDOT on ARM) multiplies a pair (or four bytes) of x, broadcast, with those of
// the outputs of a register, so no sum across lanes is ever needed. Each output is summed along k in order whatever the tile's
// shape: a row's result does not depend on the rows beside it.
#pragma once
#include "task.h"

// As many rows as the registers hold sums of.
#if defined(__AVX512F__)
static const int kTileRows = 12;
#else
static const int kTileRows = 3;
#endif
static const int64_t kPair = 2 * kLanes;  // operands of a step of two panels

struct bytes4 {
  uint32_t bits;
};
template <typename S>
struct Sum {
  typedef floats type;
};
template <>
struct Sum<bytes4> {
  typedef ints type;
};

static inline floats multiply_add(floats sum, float x, const float* weights) {
  return sum + x * load16(weights);
}

// One instruction for a pair.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DOT_OF_PAIRS
#endif
#if defined(__AVX512BF16__)
static inline floats multiply_add(floats sum, uint32_t pair, const uint32_t* weights) {
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair),
                                  (__m512bh)_mm512_loadu_si512(weights));
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
static inline floats multiply_add(floats sum, uint32_t pair, const uint32_t* weights) {
  const bfloat16x8_t x = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  return by_registers<float32x4_t>(sum, [&](float32x4_t part, int i) {
    return vbfdotq_f32(part, x, vreinterpretq_bf16_u32(vld1q_u32(weights + 4 * i)));
  });
}
#else
static inline floats multiply_add(floats sum, uint32_t pair, const uint32_t* weights) {
  floats even, odd;
  load_pairs(weights, even, odd);
  sum += from_bits(pair << 16) * even;
  return sum + from_bits(pair & 0xffff0000u) * odd;
}
#endif

// weights: four unsigned bytes a lane; x: four signed ones.
static inline ints multiply_bytes(ints sum, uint32_t x, words weights) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32((int)x));
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t bytes = vreinterpretq_s8_u32(vdupq_n_u32(x));
  uint8x16_t w[4];
  std::memcpy(w, &weights, 64);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return by_registers<int32x4_t>(sum, [&](int32x4_t part, int i) { return vusdotq_s32(part, w[i], bytes); });
#else
  // signed by signed alone: of the weights 128 is taken away, and 128 times the bytes of x added
  const int32x4_t more = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), bytes, vdupq_n_s8(64)), 1);
  return by_registers<int32x4_t>(sum, [&](int32x4_t part, int i) {
    return vdotq_s32(part + more, vreinterpretq_s8_u8(veorq_u8(w[i], vdupq_n_u8(128))), bytes);
  });
#endif
#else
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) sum += (ints)((weights >> (8 * i)) & 0xffu) * int32_t(int8_t(x >> (8 * i)));
  return sum;
#endif
}
static inline ints multiply_add(ints sum, bytes4 x, const bytes4* weights) {
  words w;
  std::memcpy(&w, weights, 64);
  return multiply_bytes(sum, x.bits, w);
}

// What is asked for while products run, so that it comes from memory meanwhile: so many cache lines a step.
struct Ahead {
  const char* at;
  int lines;  // 0 to 2
};

// sums += x times weights. Rows are reached in fours from three pointers: twelve of their own would not fit in the registers
// for addresses, and the compiler would keep some of them in those for sums.
template <typename S, int ROWS>
static inline __attribute__((always_inline)) void multiply(typename Sum<S>::type (&sums)[ROWS][2], const S* x,
                                                           int64_t x_stride, const S* weights, int64_t steps,
                                                           Ahead ahead = {nullptr, 0}) {
  const S *first = x, *second = x + 4 * x_stride, *third = x + 8 * x_stride;
  const int64_t thrice = 3 * x_stride;
  for (int64_t k = 0; k < steps; k++) {
    if (ahead.lines) __builtin_prefetch(ahead.at + 64 * ahead.lines * k, 0, 2);
    if (ahead.lines == 2) __builtin_prefetch(ahead.at + 128 * k + 64, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const S* four = r < 4 ? first : r < 8 ? second : third;
      const S& operand = four[r % 4 == 3 ? thrice : r % 4 * x_stride];
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) sums[r][c] = multiply_add(sums[r][c], operand, weights + k * kPair + c * kLanes);
    }
    first++, second++, third++;
    __asm__("" : "+r"(first), "+r"(second), "+r"(third));  // the compiler may not take them for one
  }
}
