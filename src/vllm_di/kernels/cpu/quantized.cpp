// x [rows, k] times quantised weights -> [rows, n].
//
// A weight is scale * q + offset, with q an unsigned integer of 8 or 4 bits. Activations become signed bytes on the way, so
// that a product of four is one instruction of AVX512-VNNI:
//   by channel: one scale an output, q of 8 bits around 128; activations have one scale a row. Sums stay integers to the end.
//   by group: fp16 scale and offset for 32 weights along k, as in GGUF; activations have one scale a group of 32 too.
#include "tiled.h"

static const int64_t kGroup = 32;       // weights of a group along k
static const int64_t kSteps = kGroup / 4;
static const int kGroupRows = kTileRows > 6 ? 6 : kTileRows;  // of a tile of groups
#if defined(__SSE2__) && !defined(__AVX2__)
static const int kUnrolledSteps = 1;  // of a group: one is long without such instructions, and eight take the compiler a minute
#else
static const int kUnrolledSteps = 8;
#endif
static const float kBytes = 127.f;      // activations lie in [-127, 127]

static inline floats half_to_float(const uint16_t* p) {
#if defined(__AVX512F__)
  return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__ARM_FEATURE_DOTPROD)
  return by_registers<float32x4_t>(
      floats{}, [&](float32x4_t, int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
#else
  halves narrow;
  std::memcpy(&narrow, p, 32);
  const words w = __builtin_convertvector(narrow, words);
  return (floats)((words)((floats)((w & 0x7fffu) << 13) * 0x1p112f) | (w & 0x8000u) << 16);
#endif
}

static inline floats absolute(floats v) { return (floats)((words)v & 0x7fffffffu); }

// Sixteen values to signed bytes, to nearest; adds them to `sums`.
static inline void to_bytes(floats v, float inverse, int8_t* out, ints& sums) {
  const floats scaled = v * inverse;
#if defined(__AVX512F__)
  const __m512i whole = _mm512_cvtps_epi32((__m512)scaled);
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(whole));
  sums += (ints)whole;
#elif defined(__ARM_FEATURE_DOTPROD)
  float32x4_t q[4];
  std::memcpy(q, &scaled, 64);
  int32x4_t whole[4];
  for (int i = 0; i < 4; i++) whole[i] = vcvtnq_s32_f32(q[i]);
  for (int i = 0; i < 4; i += 2)
    vst1_s8(out + 4 * i, vmovn_s16(vcombine_s16(vmovn_s32(whole[i]), vmovn_s32(whole[i + 1]))));
  ints all;
  std::memcpy(&all, whole, 64);
  sums += all;
#else
  for (int i = 0; i < kLanes; i++) {
    const int32_t whole = int32_t(std::nearbyint(scaled[i]));
    out[i] = int8_t(whole);
    sums[i] += whole;
  }
#endif
}

// `count` values (whole sixteens) as bytes: scale in `scale`, sum of the bytes returned.
template <typename T>
static int32_t quantize(const T* x, int64_t count, int8_t* out, float& scale) {
  floats most{}, strange{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const floats v = absolute(load16(x + i));
    most = v > most ? v : most;
    strange += v - v;  // 0, or NaN for what is not finite: then so is the result
  }
  scale = (largest(most) + total(strange)) / kBytes;
  const float inverse = scale > 0.f ? 1.f / scale : 0.f;
  ints sums{};
  for (int64_t i = 0; i < count; i += kLanes) to_bytes(load16(x + i), inverse, out + i, sums);
  return total(sums);
}

// Activations as bytes, in the team's workspace: scales and sums [rows, parts], then bytes [rows, k], `stride` apart.
struct Bytes {
  int8_t* x;
  int64_t stride;
  float *scales, *sums;  // sums: of the bytes, times their scale

  static size_t workspace(int64_t rows, int64_t k, int64_t part) { return size_t(rows * spaced(k) / 4 + 2 * rows * (k / part)); }

  template <typename T>
  static Bytes make(const Team& team, const T* x, int64_t rows, int64_t k, int64_t x_stride, int64_t part) {
    const int64_t parts = k / part;
    float* base = team.shared->workspace.data();
    const Bytes made{(int8_t*)(base + 2 * rows * parts), spaced(k), base, base + rows * parts};
    for (int64_t i = team.first(rows * parts); i < team.last(rows * parts); i++) {
      const int64_t row = i / parts, at = i % parts * part;
      const int32_t sum = quantize(x + row * x_stride + at, part, made.x + row * made.stride + at, made.scales[i]);
      made.sums[i] = float(sum) * made.scales[i];
    }
    team.barrier();
    return made;
  }
  // x_dtype: as DISPATCH names it. Products read bytes alone: they are compiled once for all types of x.
  static Bytes make(const Team& team, int x_dtype, const void* x, int64_t rows, int64_t k, int64_t x_stride, int64_t part) {
    DISPATCH(x_dtype, T, { return make(team, (const T*)x, rows, k, x_stride, part); })
  }
};

// ---- by channel ---------------------------------------------------------------------------------

struct ByChannel {
  int x_dtype;
  const void* x;
  const bytes4* weights;  // pairs of panels [k / 4][2][16][4]
  const float* scales;    // [n], whole pairs
  int64_t rows, k, x_stride;
  Output to;

  int64_t work() const { return rows * to.pairs() * kPair * k / 4; }
  void run(const Team& team) const {
    const Bytes in = Bytes::make(team, x_dtype, x, rows, k, x_stride, k);
    const int64_t steps = k / 4, size = steps * kPair;
    over_pairs<kTileRows>(team, rows, to.pairs(), weights, 4 * size, [&](auto count, int64_t row, int64_t pair, Ahead ahead) {
      const int ROWS = decltype(count)::value;
      ints sums[ROWS][2] = {};
      multiply<bytes4, ROWS>(sums, (const bytes4*)(in.x + row * in.stride), in.stride / 4, weights + pair * size, steps, ahead);
      for (int r = 0; r < ROWS; r++) put(in, sums[r][0], sums[r][1], row + r, pair);
    });
  }

  inline void put(const Bytes& in, ints one, ints other, int64_t row, int64_t pair) const {
    const float scale = in.scales[row], less = 128.f * in.sums[row];
    to.put((__builtin_convertvector(one, floats) * scale - less) * load16(scales + pair * kPair),
           (__builtin_convertvector(other, floats) * scale - less) * load16(scales + pair * kPair + kLanes), row, pair);
  }
};

#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
// The same by tile registers: the same whole numbers, and so the same bits.
struct TiledByChannel {
  ByChannel p;

  int64_t work() const { return p.work(); }
  size_t bytes() const { return Bytes::workspace(p.rows, p.k, p.k); }
  size_t workspace() const { return bytes() + TileRows::workspace(p.rows, p.k / 4); }
  void run(const Team& team) const {
    const Bytes bytes_in = Bytes::make(team, p.x_dtype, p.x, p.rows, p.k, p.x_stride, p.k);
    const TileRows in = TileRows::make<4>(team, bytes_in.x, p.rows, p.k, bytes_in.stride, team.shared->workspace.data() + bytes());
    const int64_t steps = p.k / 4, size = steps * kPair;
    const uint32_t* weights = (const uint32_t*)p.weights;
    over_blocks<DotInt8>(team, in, p.rows, p.to.pairs(), steps, size, [&](int64_t pair) { return weights + pair * size; },
                         [&](const int32_t* sums, int64_t row, int64_t pair) {
                           ints one, other;
                           std::memcpy(&one, sums, 64);
                           std::memcpy(&other, sums + kLanes, 64);
                           p.put(bytes_in, one, other, row, pair);
                         });
  }
};
#endif

// ---- by group -----------------------------------------------------------------------------------

// A group of a panel: bytes [steps][16][4], or nibbles of them (step i in the low half of step i + 4's byte), then 16 scales
// and 16 offsets in fp16. Those of a pair of panels lie side by side.
template <int BITS>
struct Group {
  static const int64_t kBytesOfQ = kGroup * kLanes * BITS / 8, kSize = kBytesOfQ + 4 * kLanes;

  static inline words q(const uint8_t* group, int step) {
    words w;
    std::memcpy(&w, group + 64 * (BITS == 8 ? step : step % 4), 64);
    return BITS == 8 ? w : (step < 4 ? w : w >> 4) & 0x0f0f0f0fu;
  }
  // The bytes of one output.
  static inline void row(const uint8_t* group, int64_t lane, uint8_t (&to)[kGroup]) {
    for (int64_t i = 0; i < kGroup * BITS / 32; i++) std::memcpy(to + 4 * i, group + 64 * i + 4 * lane, 4);
    for (int64_t i = 0; BITS == 4 && i < kGroup / 2; i++) {
      to[kGroup / 2 + i] = to[i] >> 4;
      to[i] &= 15;
    }
  }
  static inline floats scale(const uint8_t* group) { return half_to_float((const uint16_t*)(group + kBytesOfQ)); }
  static inline floats offset(const uint8_t* group) { return half_to_float((const uint16_t*)(group + kBytesOfQ) + kLanes); }
};

template <int BITS>
struct ByGroup {
  typedef Group<BITS> G;
  int x_dtype;
  const void* x;
  const uint8_t* weights;  // pairs of panels [k / 32][2] of groups
  int64_t rows, k, x_stride;
  Output to;

  int64_t work() const { return rows * to.pairs() * kPair * k / 4; }
  void run(const Team& team) const {
    const Bytes in = Bytes::make(team, x_dtype, x, rows, k, x_stride, kGroup);
    const int64_t size = 2 * G::kSize * k / kGroup;
    over_pairs<kGroupRows>(team, rows, to.pairs(), weights, size, [&](auto count, int64_t row, int64_t pair, Ahead ahead) {
      const int ROWS = decltype(count)::value;
      floats sums[ROWS][2] = {};
      add<ROWS>(in, row, weights + pair * size, ahead, sums);
      for (int r = 0; r < ROWS; r++) to.put(sums[r][0], sums[r][1], row + r, pair);
    });
  }

  template <int ROWS>
  inline __attribute__((always_inline)) void add(const Bytes& in, int64_t row, const uint8_t* at, Ahead ahead,
                                                 floats (&sums)[ROWS][2]) const {
    const int64_t groups = k / kGroup, width = in.stride / 4;
    const uint32_t* x_at = (const uint32_t*)(in.x + row * in.stride);
    const float *scale_at = in.scales + row * groups, *sum_at = in.sums + row * groups;
    for (int64_t g = 0; g < groups; g++, at += 2 * G::kSize) {
      const int64_t share = ahead.lines * G::kSize;  // of the two that a pair's group takes
      for (int64_t i = 0; i < share; i += kLine) __builtin_prefetch(ahead.at + g * share + i, 0, 2);
      ints dots[ROWS][2] = {};
#pragma GCC unroll kUnrolledSteps
      for (int i = 0; i < kSteps; i++) {
        const words one = G::q(at, i / 2 + i % 2 * 4), other = G::q(at + G::kSize, i / 2 + i % 2 * 4);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          const uint32_t bytes = x_at[r * width + g * kSteps + i / 2 + i % 2 * 4];
          dots[r][0] = multiply_bytes(dots[r][0], bytes, one);
          dots[r][1] = multiply_bytes(dots[r][1], bytes, other);
        }
      }
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) {
        const floats scale = G::scale(at + c * G::kSize), offset = G::offset(at + c * G::kSize);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          sums[r][c] += __builtin_convertvector(dots[r][c], floats) * (scale * scale_at[r * groups + g]);
          sums[r][c] += offset * sum_at[r * groups + g];
        }
      }
    }
  }
};

#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
// Pairs of bf16, to nearest even; a NaN stays one.
static inline words to_pairs(floats even, floats odd) {
  const auto rounded = [](floats v) {
    const words w = (words)v, near = w + 0x7fffu + ((w >> 16) & 1u);
    return v != v ? (w | 0x400000u) : near;
  };
  return rounded(even) >> 16 | (rounded(odd) & 0xffff0000u);
}

// The same in bf16 by tile registers: a pair of panels becomes bf16 once for a span of rows, and x is not rounded to bytes. So
// sums need no scale of their own for each group, and results differ from those of few rows by that rounding.
template <int BITS>
struct TiledByGroup {
  typedef Group<BITS> G;
  ByGroup<BITS> p;

  int64_t work() const { return p.work(); }
  size_t blocks() const { return TileRows::workspace(p.rows, p.k / 2); }
  size_t workspace(int threads) const { return blocks() + size_t(threads * p.k / 2 * kPair); }
  void run(const Team& team) const {
    float* space = team.shared->workspace.data();
    TileRows in{};
    DISPATCH(p.x_dtype, T, { in = TileRows::make<2>(team, (const T*)p.x, p.rows, p.k, p.x_stride, space); })
    const int64_t steps = p.k / 2;
    uint32_t* panels = (uint32_t*)(space + blocks()) + team.index * steps * kPair;
    over_blocks<DotBf16>(team, in, p.rows, p.to.pairs(), steps, 0, [&](int64_t pair) { return unpack(pair, panels); },
                         [&](const float* sums, int64_t row, int64_t pair) {
                           p.to.put(load16(sums), load16(sums + kLanes), row, pair);
                         });
  }

  const uint32_t* unpack(int64_t pair, uint32_t* panels) const {
    const int64_t groups = p.k / kGroup;
    const uint8_t* group = p.weights + pair * groups * 2 * G::kSize;
    for (int64_t g = 0; g < 2 * groups; g++, group += G::kSize) {
      const floats scale = G::scale(group), offset = G::offset(group);
      uint32_t* to = panels + g / 2 * (kGroup / 2) * kPair + g % 2 * kLanes;
      for (int step = 0; step < kSteps; step++) {
        const words q = G::q(group, step);
        floats v[4];
        for (int i = 0; i < 4; i++) v[i] = __builtin_convertvector((ints)((q >> (8 * i)) & 0xffu), floats) * scale + offset;
        for (int i = 0; i < 2; i++) {
          const words both = to_pairs(v[2 * i], v[2 * i + 1]);
          std::memcpy(to + (2 * step + i) * kPair, &both, 64);
        }
      }
    }
    return panels;
  }
};
#endif

// x [rows, k] fp32 (x_dtype 0) or bf16 (1). bits 0: by channel, with `scales`; 4 or 8: by group, scales null.
// k: a multiple of 32. tiled: by tile registers, which a library has or not (has_tiles).
EXPORT void quantized_linear(int x_dtype, int bits, const void* x, const void* weights, const float* scales,
                             const void* bias, void* out, int bias_dtype, int64_t rows, int64_t n, int64_t k,
                             int64_t x_stride, int out_dtype, int gate, int tiled, int threads) {
  const Output to{out, bias, n, out_dtype, bias_dtype, Gate(gate)};
#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
  if (tiled) {
    const uint8_t* groups = (const uint8_t*)weights;
    if (bits == 0) {
      const TiledByChannel task{{x_dtype, x, (const bytes4*)weights, scales, rows, k, x_stride, to}};
      reserve(task.workspace());
      submit(task, threads);
    } else if (bits == 4) {
      const TiledByGroup<4> task{{x_dtype, x, groups, rows, k, x_stride, to}};
      reserve(task.workspace(threads));
      submit(task, threads);
    } else {
      const TiledByGroup<8> task{{x_dtype, x, groups, rows, k, x_stride, to}};
      reserve(task.workspace(threads));
      submit(task, threads);
    }
    return;
  }
#endif
  reserve(Bytes::workspace(rows, k, bits == 0 ? k : kGroup));
  if (bits == 0)
    submit(ByChannel{x_dtype, x, (const bytes4*)weights, scales, rows, k, x_stride, to}, threads);
  else if (bits == 4)
    submit(ByGroup<4>{x_dtype, x, (const uint8_t*)weights, rows, k, x_stride, to}, threads);
  else
    submit(ByGroup<8>{x_dtype, x, (const uint8_t*)weights, rows, k, x_stride, to}, threads);
}

// Rows of a weight by group, as floats.
template <typename T, int BITS>
struct GroupRows {
  typedef Group<BITS> G;
  const int64_t* ids;
  const uint8_t* weights;
  T* out;
  int64_t tokens, k;
  int64_t work() const { return 8 * tokens * k; }
  void run(const Team& team) const {
    const int64_t groups = k / kGroup;
    for (int64_t t = team.first(tokens); t < team.last(tokens); t++) {
      const int64_t panel = ids[t] / kLanes, lane = ids[t] % kLanes;
      const uint8_t* group = weights + (panel / 2 * groups * 2 + panel % 2) * G::kSize;
      T* to = out + t * k;
      for (int64_t g = 0; g < groups; g++, group += 2 * G::kSize, to += kGroup) {
        uint8_t q[kGroup];
        G::row(group, lane, q);
        const float scale = G::scale(group)[lane], offset = G::offset(group)[lane];
        for (int64_t i = 0; i < kGroup; i++) store(to + i, q[i] * scale + offset);
      }
    }
  }
};

// out: [tokens, k] fp32 (out_dtype 0) or bf16 (1). bits: 4 or 8.
EXPORT void group_rows(int out_dtype, int bits, const int64_t* ids, const uint8_t* weights, void* out, int64_t tokens,
                       int64_t k, int threads) {
  DISPATCH(out_dtype, T, {
    if (bits == 4)
      submit(GroupRows<T, 4>{ids, weights, (T*)out, tokens, k}, threads);
    else
      submit(GroupRows<T, 8>{ids, weights, (T*)out, tokens, k}, threads);
  })
}

// q: [n, k] bytes -> pairs of panels [k / 4][2][16][4]; missing outputs are 128, which stands for 0.
EXPORT void pack_channels(const uint8_t* q, uint8_t* out, int64_t n, int64_t k, int threads) {
  const int64_t pairs = (n + kPair - 1) / kPair;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t pair = 0; pair < pairs; pair++)
    for (int64_t i = 0; i < k; i += 4)
      for (int64_t lane = 0; lane < kPair; lane++) {
        uint8_t* to = out + ((pair * k / 4 + i / 4) * kPair + lane) * 4;
        const int64_t row = pair * kPair + lane;
        if (row < n)
          std::memcpy(to, q + row * k + i, 4);
        else
          std::memset(to, 128, 4);
      }
}

// q: [n, k] bytes (below 16 for 4 bits); scales, offsets: [n, k / 32] fp16 -> pairs of panels of groups; missing outputs are 0.
EXPORT void pack_groups(int bits, const uint8_t* q, const uint16_t* scales, const uint16_t* offsets, uint8_t* out,
                        int64_t n, int64_t k, int threads) {
  const int64_t panels = (n + kLanes - 1) / kLanes, groups = k / kGroup;
  const int64_t in_q = kGroup * kLanes * bits / 8, size = in_q + 4 * kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t g = 0; g < groups; g++) {
      uint8_t* to = out + ((panel / 2 * groups + g) * 2 + panel % 2) * size;
      std::memset(to, 0, size_t(size));
      for (int64_t lane = 0; lane < kLanes && panel * kLanes + lane < n; lane++) {
        const int64_t row = panel * kLanes + lane;
        const uint8_t* from = q + row * k + g * kGroup;
        for (int64_t i = 0; i < kGroup; i++) {
          const int64_t step = i / 4, byte = lane * 4 + i % 4;
          if (bits == 8)
            to[step * 64 + byte] = from[i];
          else
            to[step % 4 * 64 + byte] = uint8_t(to[step % 4 * 64 + byte] | from[i] << (step / 4 * 4));
        }
        std::memcpy(to + in_q + lane * 2, scales + row * groups + g, 2);
        std::memcpy(to + in_q + 2 * kLanes + lane * 2, offsets + row * groups + g, 2);
      }
    }
}
