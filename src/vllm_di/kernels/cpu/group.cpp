// Collectives among the ranks of one host, over memory that all of them map.
//
// Every rank has a flag that counts the steps it has published and two slots of `piece` bytes, taken in turn: what is
// longer than a slot goes in several steps. In step s a rank waits until all flags are at s (then everybody has read
// what lay in this slot two steps ago), writes its slot, sets its flag to s + 1, and reads the others' slots when their
// flags say so.
//
// Whoever waits spins for a while, then sleeps in the kernel (futex), and looks every 100 ms whether its peer still lives.
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>

#include "common.h"

struct fp16 {
  uint16_t bits;
};
static inline float load(const fp16* p) {
  const uint32_t sign = uint32_t(p->bits & 0x8000u) << 16, exponent = p->bits >> 10 & 31, fraction = p->bits & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = float(fraction) * 0x1p-24f;
  return sign ? -small : small;
}
// Rounds to nearest even; a NaN stays one.
static inline void store(fp16* p, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  const uint32_t sign = wide >> 16 & 0x8000u, size = wide & 0x7fffffffu;
  if (size > 0x7f800000u) {
    p->bits = uint16_t(sign | 0x7e00u);
  } else if (size >= 0x477ff000u) {  // 65520 and above
    p->bits = uint16_t(sign | 0x7c00u);
  } else if (size < 0x38800000u) {  // below the smallest normal number: a count of 2^-24
    p->bits = uint16_t(sign | uint32_t(std::nearbyint(from_bits(size) * 0x1p24f)));
  } else {
    p->bits = uint16_t(sign | ((size + 0xfffu + (size >> 13 & 1) - 0x38000000u) >> 13));
  }
}
static inline floats load16(const fp16* p) { return load_some(p, kLanes); }
static inline void store16(fp16* p, floats v) { store_some(p, v, kLanes); }

namespace {

static_assert(std::atomic<uint32_t>::is_always_lock_free, "flags are shared by processes");
const int64_t kLookEvery = 100 * 1000 * 1000;  // nanoseconds
const int64_t kYieldAfter = 3000;              // nanoseconds
const int64_t kTwoShot = 32 << 10;             // bytes: from here on each of three ranks or more sums a share alone

struct alignas(128) Flag {
  std::atomic<uint32_t> count, sleepers, left;
};

struct Group {
  char* base;
  int64_t bytes, piece, spin, timeout;  // spin and timeout in nanoseconds
  int rank, world;
  uint32_t step;
  std::vector<int> processes;  // by rank: readable when the process has ended

  static int64_t head(int world) { return world * int64_t(sizeof(Flag)); }
  static int64_t total(int world, int64_t piece) { return head(world) + 2 * piece * world; }
  Flag& flag(int r) { return reinterpret_cast<Flag*>(base)[r]; }
  char* slot(int r, uint32_t s) { return base + head(world) + (2 * r + (s & 1)) * piece; }
};

enum Trouble { kNone = 0, kDied = 1, kLeft = 2, kLate = 3 };
int trouble(Trouble kind, int rank) { return kind << 16 | rank; }

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

void sleep_while(Flag& flag, uint32_t seen) {
  const timespec most{0, kLookEvery};
  flag.sleepers.fetch_add(1);
  syscall(SYS_futex, &flag.count, FUTEX_WAIT, seen, &most, nullptr, 0);
  flag.sleepers.fetch_sub(1);
}

void publish(Flag& flag, uint32_t count) {
  flag.count.store(count);
  if (flag.sleepers.load()) syscall(SYS_futex, &flag.count, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// The first rank that has died, or -1.
int dead(Group& g) {
  for (int r = 0; r < g.world; r++) {
    pollfd one{g.processes[r], POLLIN, 0};
    if (r != g.rank && poll(&one, 1, 0) > 0) return r;
  }
  return -1;
}

// Returns when `flag`, which rank `on` moves, has reached `count` (they wrap around); or the trouble.
int await(Group& g, Flag& flag, uint32_t count, int on) {
  const auto reached = [&] { return int32_t(flag.count.load(std::memory_order_acquire) - count) >= 0; };
  if (reached()) return kNone;
  const int64_t begin = now();
  for (int64_t waited = 0; waited < g.spin; waited = now() - begin) {
    for (int i = 0; i < 16; i++) {
      relax();
      if (reached()) return kNone;
    }
    if (waited > kYieldAfter) sched_yield();  // the peer may be waiting for this very core
  }
  for (int64_t looked = begin;;) {
    const uint32_t seen = flag.count.load();
    if (reached()) return kNone;
    sleep_while(flag, seen);
    const int64_t time = now();
    if (time - looked < kLookEvery) continue;
    looked = time;
    const int gone = dead(g);
    const bool left = g.flag(on).left.load(), late = time - begin > g.timeout;
    if (reached()) return kNone;
    if (gone >= 0) return trouble(kDied, gone);
    if (left) return trouble(kLeft, on);
    if (late) return trouble(kLate, on);
  }
}

int await_all(Group& g, uint32_t count) {
  for (int r = 0; r < g.world; r++)
    if (r != g.rank)
      if (int bad = await(g, g.flag(r), count, r)) return bad;
  return kNone;
}

// One step: `write` fills this rank's slot, `read` runs when all have.
template <typename Write, typename Read>
int exchange(Group& g, Write write, Read read) {
  if (int bad = await_all(g, g.step)) return bad;
  write(g.slot(g.rank, g.step));
  publish(g.flag(g.rank), g.step + 1);
  if (int bad = await_all(g, g.step + 1)) return bad;
  read(g.step);
  g.step++;
  return kNone;
}

// out = the sum over ranks, in the order of ranks; `from(r)` is where rank r's elements lie.
template <typename T, typename From>
void sum_floats(From from, T* out, int64_t count, int world) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    floats sum = load16((const T*)from(0) + i);
    for (int r = 1; r < world; r++) sum += load16((const T*)from(r) + i);
    store16(out + i, sum);
  }
  for (; i < count; i++) {
    float sum = load((const T*)from(0) + i);
    for (int r = 1; r < world; r++) sum += load((const T*)from(r) + i);
    store(out + i, sum);
  }
}
template <typename T, typename From>
void sum_plain(From from, T* out, int64_t count, int world) {
  for (int64_t i = 0; i < count; i++) {
    T sum = ((const T*)from(0))[i];
    for (int r = 1; r < world; r++) sum += ((const T*)from(r))[i];
    out[i] = sum;
  }
}

// Kinds of elements: fp32, bf16, fp16, fp64, and whole numbers of 1, 2, 4, 8 bytes, which wrap around.
const int64_t kSizes[] = {4, 2, 2, 8, 1, 2, 4, 8};
template <typename From>
void sum(int kind, From from, void* out, int64_t count, int world) {
  switch (kind) {
    case 0: return sum_floats(from, (float*)out, count, world);
    case 1: return sum_floats(from, (bf16*)out, count, world);
    case 2: return sum_floats(from, (fp16*)out, count, world);
    case 3: return sum_plain(from, (double*)out, count, world);
    case 4: return sum_plain(from, (uint8_t*)out, count, world);
    case 5: return sum_plain(from, (uint16_t*)out, count, world);
    case 6: return sum_plain(from, (uint32_t*)out, count, world);
    default: return sum_plain(from, (uint64_t*)out, count, world);
  }
}

}  // namespace

EXPORT int64_t group_bytes(int world, int64_t piece) { return Group::total(world, piece); }

// Maps the memory behind `file`, which must be zeroed and of group_bytes(). `processes`: by rank, a file descriptor that
// becomes readable when the process ends; it stays the caller's. piece: bytes, a multiple of 64 * world. Null on failure.
EXPORT void* group_open(int file, int rank, int world, int64_t piece, int64_t spin, int64_t timeout, const int* processes) {
  const int64_t bytes = Group::total(world, piece);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (base == MAP_FAILED) return nullptr;
  return new Group{(char*)base, bytes, piece, spin, timeout, rank, world, 0, {processes, processes + world}};
}

EXPORT void group_close(void* handle) {
  Group* g = (Group*)handle;
  g->flag(g->rank).left.store(1);
  munmap(g->base, g->bytes);
  delete g;
}

// All of these return 0, or what went wrong (Trouble << 16 | rank); the group is of no use after that.

// x, out [count] of one kind; they may be the same.
EXPORT int group_all_reduce(void* handle, int kind, const void* x, void* out, int64_t count) {
  Group& g = *(Group*)handle;
  const int64_t size = kSizes[kind], most = g.piece / size;
  const bool shares = g.world > 2 && count * size >= kTwoShot;
  for (int64_t at = 0; at < count; at += most) {
    const int64_t n = std::min(most, count - at);
    const char* mine = (const char*)x + at * size;
    char* to = (char*)out + at * size;
    const auto write = [&](char* slot) { std::memcpy(slot, mine, n * size); };
    if (!shares) {
      const auto read = [&](uint32_t s) { sum(kind, [&](int r) { return g.slot(r, s); }, to, n, g.world); };
      if (int bad = exchange(g, write, read)) return bad;
      continue;
    }
    const auto begin = [&](int r) { return n * r / g.world * size; };  // of a rank's share, in bytes
    const int64_t own = begin(g.rank), length = begin(g.rank + 1) - own;
    const auto add = [&](uint32_t s) {
      sum(kind, [&](int r) { return g.slot(r, s) + own; }, to + own, length / size, g.world);
    };
    if (int bad = exchange(g, write, add)) return bad;
    const auto give = [&](char* slot) { std::memcpy(slot + own, to + own, length); };
    const auto take = [&](uint32_t s) {
      for (int r = 0; r < g.world; r++)
        if (r != g.rank) std::memcpy(to + begin(r), g.slot(r, s) + begin(r), begin(r + 1) - begin(r));
    };
    if (int bad = exchange(g, give, take)) return bad;
  }
  return kNone;
}

// x [outer, inner] of every rank -> out [outer, world, inner]; inner in bytes.
EXPORT int group_all_gather(void* handle, const void* x, void* out, int64_t outer, int64_t inner) {
  Group& g = *(Group*)handle;
  for (int64_t at = 0; at < outer * inner; at += g.piece) {
    const int64_t n = std::min(g.piece, outer * inner - at);
    const auto write = [&](char* slot) { std::memcpy(slot, (const char*)x + at, n); };
    const auto read = [&](uint32_t s) {
      for (int r = 0; r < g.world; r++)
        for (int64_t done = 0; done < n;) {  // a row, or the part of one that lies in this piece
          const int64_t row = (at + done) / inner, column = (at + done) % inner;
          const int64_t length = std::min(inner - column, n - done);
          std::memcpy((char*)out + (row * g.world + r) * inner + column, g.slot(r, s) + done, length);
          done += length;
        }
    };
    if (int bad = exchange(g, write, read)) return bad;
  }
  return kNone;
}
