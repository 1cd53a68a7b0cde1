// Tile registers: eight of up to 16 rows of 64 bytes, and products of them. Two implementations behind the same names: the
// instructions of AMX, and plain C++ (EMULATE_TILES) that any machine runs. kTiles says whether there is either.
//
//   tile_config()               gives all registers their shape, 16 rows of 64 bytes; before the first use in a thread
//   tile_release()              gives them back; after the last
//   tile_zero(c)                c = 0
//   tile_load(t, from, stride)  16 rows of 64 bytes; the stride counts bytes
//   tile_store(t, to, stride)
//   tile_dot_bf16(c, a, b)      c [16, 16] fp32 += a [16, 16] pairs of bf16 times b [16 steps, 16 outputs] pairs of bf16
//   tile_dot_int8(c, a, b)      c [16, 16] int32 += a [16, 16] fours of signed bytes times b [16 steps, 16 outputs] of unsigned
//
// Registers are numbered by literals: the compiler cannot move them. The layout of b is that of a panel (tile.h).
#pragma once
#include <type_traits>

#include "tile.h"

static const int64_t kTileHeight = 16, kTileWidth = 16;  // rows, and words of a row

// Palette 1 of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64, "what LDTILECFG reads");

#if defined(__AMX_TILE__)

#include <immintrin.h>
static const bool kTiles = true;

// The intrinsics of gcc 12 name no memory that they read (_tile_loadconfig names 8 of its 64 bytes): without a barrier the
// compiler drops or delays what was stored there.
#define TILE_BARRIER() __asm__ volatile("" ::: "memory")

static inline void tile_config() {
  const TileShapes shapes;
  const TileShapes* at = &shapes;
  __asm__ volatile("" : "+r"(at) : : "memory");
  _tile_loadconfig(at);
}
static inline void tile_release() { _tile_release(); }
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride)  \
  do {                                 \
    TILE_BARRIER();                    \
    _tile_loadd(tile, (from), (stride)); \
  } while (0)
#define tile_store(tile, to, stride)   \
  do {                                 \
    _tile_stored(tile, (to), (stride)); \
    TILE_BARRIER();                    \
  } while (0)
#define tile_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_dot_int8(c, a, b) _tile_dpbsud(c, a, b)

#elif defined(EMULATE_TILES)

static const bool kTiles = true;

struct Tiles {
  bool configured = false;
  words rows[8][kTileHeight] = {};

  static Tiles& of_thread() {
    static thread_local Tiles tiles;
    return tiles;
  }
};

// Traps where the instruction would fault: another palette, a reserved byte, a shape beyond the register.
static inline void tile_config() {
  const TileShapes shapes;
  bool fits = shapes.palette == 1 && shapes.start_row == 0;
  for (uint8_t byte : shapes.reserved) fits &= byte == 0;
  for (int i = 0; i < 16; i++) fits &= shapes.bytes[i] <= (i < 8 ? 64 : 0) && shapes.rows[i] <= (i < 8 ? 16 : 0);
  if (!fits) __builtin_trap();
  Tiles::of_thread() = Tiles{true, {}};
}
static inline void tile_release() { Tiles::of_thread().configured = false; }

// The registers; a use before tile_config traps, as the instructions do.
static inline words (&emulated(int tile))[kTileHeight] {
  Tiles& tiles = Tiles::of_thread();
  if (!tiles.configured) __builtin_trap();
  return tiles.rows[tile];
}
static inline void tile_zero(int tile) { std::memset(emulated(tile), 0, 64 * kTileHeight); }
static inline void tile_load(int tile, const void* from, int64_t stride) {
  for (int64_t r = 0; r < kTileHeight; r++) std::memcpy(&emulated(tile)[r], (const char*)from + r * stride, 64);
}
static inline void tile_store(int tile, void* to, int64_t stride) {
  for (int64_t r = 0; r < kTileHeight; r++) std::memcpy((char*)to + r * stride, &emulated(tile)[r], 64);
}

// Sums as TDPBF16PS does: even and odd elements apart, then both together, then onto c. Unlike there, denormals count.
static inline void tile_dot_bf16(int c, int a, int b) {
  words(&sums)[kTileHeight] = emulated(c);
  const words(&x)[kTileHeight] = emulated(a), (&weights)[kTileHeight] = emulated(b);
  for (int64_t r = 0; r < kTileHeight; r++) {
    floats even{}, odd{};
    for (int64_t k = 0; k < kTileWidth; k++) {
      floats one, other;
      load_pairs(&weights[k], one, other);
      even += from_bits(x[r][k] << 16) * one;
      odd += from_bits(x[r][k] & 0xffff0000u) * other;
    }
    sums[r] = (words)((floats)sums[r] + (even + odd));
  }
}

static inline void tile_dot_int8(int c, int a, int b) {
  words(&sums)[kTileHeight] = emulated(c);
  const words(&x)[kTileHeight] = emulated(a), (&weights)[kTileHeight] = emulated(b);
  for (int64_t r = 0; r < kTileHeight; r++) {
    ints sum = (ints)sums[r];
    for (int64_t k = 0; k < kTileWidth; k++)
      for (int i = 0; i < 4; i++) sum += (ints)((weights[k] >> (8 * i)) & 0xffu) * int32_t(int8_t(x[r][k] >> (8 * i)));
    sums[r] = (words)sum;
  }
}

#else

static const bool kTiles = false;

#endif

#if defined(__AMX_TILE__) || defined(EMULATE_TILES)

struct DotBf16 {
  typedef float Sum;
};
struct DotInt8 {
  typedef int32_t Sum;
};
// c += a times b, for the kind of operand; a macro, as registers are literals.
#define TILE_DOT(Dot, c, a, b)              \
  if (std::is_same<Dot, DotBf16>::value)    \
    tile_dot_bf16(c, a, b);                 \
  else                                      \
    tile_dot_int8(c, a, b)

// A block of sums: 32 rows of 32, registers 0 and 1 the upper sixteen, 2 and 3 the lower. Strides count bytes.
static const int64_t kBlockRows = 2 * kTileHeight;

static inline void block_zero() {
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
}
static inline void block_load(const void* sums, int64_t stride) {
  const char *upper = (const char*)sums, *lower = upper + kTileHeight * stride;
  tile_load(0, upper, stride);
  tile_load(1, upper + 64, stride);
  tile_load(2, lower, stride);
  tile_load(3, lower + 64, stride);
}
static inline void block_store(void* sums, int64_t stride) {
  char *upper = (char*)sums, *lower = upper + kTileHeight * stride;
  tile_store(0, upper, stride);
  tile_store(1, upper + 64, stride);
  tile_store(2, lower, stride);
  tile_store(3, lower + 64, stride);
}
// The block += sixteen rows of 16 words at x, and with `both` those at `lower`, times 16 steps of a pair of panels.
template <typename Dot>
static inline void block_add(const uint32_t* x, const uint32_t* lower, bool both, int64_t stride, const uint32_t* pair) {
  tile_load(6, pair, 4 * kPair);
  tile_load(4, x, stride);
  TILE_DOT(Dot, 0, 4, 6);
  tile_load(7, pair + kLanes, 4 * kPair);
  TILE_DOT(Dot, 1, 4, 7);
  if (both) {
    tile_load(5, lower, stride);
    TILE_DOT(Dot, 2, 5, 6);
    TILE_DOT(Dot, 3, 5, 7);
  }
}

#endif
