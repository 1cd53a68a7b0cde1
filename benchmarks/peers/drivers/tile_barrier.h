// For llama.cpp built by gcc 12 on a CPU with AMX: its _tile_loadconfig names 8 of the 64 bytes that it reads, so the compiler
// drops the stores before it and the process dies (SIGSEGV at ldtilecfg). Included before every file (-include).
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

static inline __attribute__((always_inline)) void tile_loadconfig_behind_barrier(const void* config) {
  __asm__ volatile("" : "+r"(config) : : "memory");
  _tile_loadconfig(config);
}
#define _tile_loadconfig tile_loadconfig_behind_barrier
#endif
