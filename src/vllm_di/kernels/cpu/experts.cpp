// A mixture-of-experts MLP: each token's experts, gated, weighted and summed.
//
// The experts' weights stay as they are, row by row. Of each a thread packs 32 rows at a time, a piece that stays in the
// first-level cache, and multiplies it with all tokens of the expert. A token's sums run in the order of the experts,
// whatever the tokens beside it.
#include "tiled.h"
#include "transpose.h"

static const int64_t kDeep = 128;  // steps of a packed piece: 16 KB
static const int64_t kRun = 4;     // pieces of work that a thread takes at once, so that it knows what comes next

// What is multiplied: floats, or pairs of bf16.
template <typename T>
struct Factor {
  typedef float type;
};
template <>
struct Factor<bf16> {
  typedef uint32_t type;
};

// 32 rows of a weight, each of k elements; those that are not there are null and count as zeros.
template <typename T>
struct PanelRows {
  typedef typename Factor<T>::type S;
  static const int64_t PER = sizeof(S) / sizeof(T);
  const T* rows[kPair];
  int64_t k, next;  // next: elements from here to the rows that are packed after these; 0 where they are not known

  uint32_t word(int64_t lane, int64_t step) const {
    uint32_t found = 0;
    const int64_t count = std::min(PER, k - step * PER);
    if (rows[lane] && count > 0) std::memcpy(&found, rows[lane] + step * PER, size_t(count) * sizeof(T));
    return found;
  }

  // Steps [first, first + steps) -> [steps][2][16]. Meanwhile what follows comes from memory.
  void pack(int64_t first, int64_t steps, uint32_t* to) const {
    for (int64_t half = 0; half < kPair; half += kLanes) {
      int64_t step = 0;
#if defined(__AVX512F__)
      const uint32_t* from[16];
      bool whole = true;
      for (int i = 0; i < 16; i++) {
        from[i] = (const uint32_t*)rows[half + i];
        whole &= from[i] != nullptr;
      }
      for (; whole && step + kLanes <= steps && (first + step + kLanes) * PER <= k; step += kLanes) {
        const int64_t behind = first + step + kDeep, soon = behind * PER < k ? behind : next / PER + step;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) __builtin_prefetch(from[i] + soon);
        transpose(from, first + step, to + step * kPair + half);
      }
#endif
      for (; step < steps; step++)
        for (int64_t lane = 0; lane < kLanes; lane++) to[step * kPair + half + lane] = word(half + lane, first + step);
    }
  }
};

// sums [rows][2][16] += x [rows, x_stride] times a piece of a pair of panels.
template <typename S>
static __attribute__((noinline)) void add_product(float* sums, const S* x, int64_t x_stride, int64_t rows, const S* weights,
                                                  int64_t steps) {
  over_rows<kTileRows>(0, rows, [&](auto count, int64_t row) {
    const int ROWS = decltype(count)::value;
    floats part[ROWS][2];
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < 2; c++) part[r][c] = load16(sums + (row + r) * kPair + c * kLanes);
    multiply<S, ROWS>(part, x + row * x_stride, x_stride, weights, steps);
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < 2; c++) store16(sums + (row + r) * kPair + c * kLanes, part[r][c]);
  });
}

#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
// The same by tile registers: steps are a multiple of 16. Up to 31 rows of x and of sums behind the last are touched, for sums
// that nobody reads.
static void add_product_tiled(float* sums, const uint32_t* x, int64_t x_stride, int64_t rows, const uint32_t* weights,
                              int64_t steps) {
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const uint32_t *upper = x + row * x_stride, *lower = upper + kTileHeight * x_stride;
    block_load(sums + row * kPair, 4 * kPair);
    for (int64_t k = 0; k < steps; k += kTileWidth)
      block_add<DotBf16>(upper + k, lower + k, true, 4 * x_stride, weights + k * kPair);
    block_store(sums + row * kPair, 4 * kPair);
  }
}
#else
static void tile_config() {}
static void tile_release() {}
static void add_product_tiled(float*, const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t) {}
#endif

template <typename T>
struct FusedExperts {
  typedef typename Factor<T>::type S;
  static const int64_t PER = sizeof(S) / sizeof(T);
  static const bool kCanTile = kTiles && PER == 2;
  static const int64_t kUnit = kCanTile ? 16 : 1;  // steps of a row are a multiple of it
  const T *x, *gate_up, *down;  // [tokens, hidden]; [experts, 2 inter, hidden]; [experts, hidden, inter]
  const float* shares;          // [tokens, k]
  const int64_t* ids;           // [tokens, k]
  T* out;
  int64_t tokens, hidden, inter, experts, k, x_stride, tile_rows;
  Gate gate;

  int64_t pairs() const { return tokens * k; }
  // With zeros at the end, so that rows begin where registers want it and not on the same lines of the cache.
  static int64_t steps_of(int64_t size) {
    const int64_t steps = (size + PER * kUnit - 1) / (PER * kUnit) * kUnit;
    return spaced(steps * int64_t(sizeof(S))) / int64_t(sizeof(S));
  }
  int64_t x_steps() const { return steps_of(hidden); }
  int64_t h_steps() const { return steps_of(inter); }
  bool tiles() const { return kCanTile && tile_rows > 0; }
  int64_t work() const { return 3 * pairs() * hidden * inter; }

  // In words: rows of x and of what is between the products [pairs, steps], sums of a thread [tokens, 32], then whole numbers.
  size_t workspace(int threads) const {
    const int64_t beyond = kCanTile ? 32 * (x_steps() + h_steps()) : 0;  // what tiles read behind the last row
    return size_t(pairs() * (x_steps() + h_steps()) + threads * tokens * kPair + 2 * (experts + 1 + pairs()) + beyond);
  }

  struct Space {
    S *x, *h;
    float* sums;
    int64_t *starts, *order;  // [experts + 1]: where an expert's pairs begin in `order`, which names pairs token * k + choice
  };
  Space space(const Team& team) const {
    char* at = (char*)team.shared->workspace.data();
    Space s;
    s.starts = (int64_t*)at;
    s.order = s.starts + experts + 1;
    s.x = (S*)(s.order + pairs());
    s.h = s.x + pairs() * x_steps();
    s.sums = (float*)(s.h + pairs() * h_steps()) + team.index * tokens * kPair;
    return s;
  }

  void run(const Team& team) const {
    const Space s = space(team);
    if (team.index == 0) {
      sort(s);
      team.shared->next.store(0, std::memory_order_relaxed);
    }
    team.barrier();
    const int64_t used = s.starts[experts];
    for (int64_t i = team.first(used); i < team.last(used); i++) {  // rows of x side by side, filled up to whole steps
      T* to = (T*)(s.x + i * x_steps());
      std::memcpy(to, x + s.order[i] / k * x_stride, size_t(hidden) * sizeof(T));
      std::fill(to + hidden, to + x_steps() * PER, T{});
    }
    team.barrier();
    if (tiles()) tile_config();
    expand(team, s);
    team.barrier();
    contract(team, s);
    if (tiles()) tile_release();
  }

  // By expert; those of an expert by token.
  void sort(const Space& s) const {
    std::fill(s.starts, s.starts + experts + 1, int64_t(0));
    for (int64_t i = 0; i < pairs(); i++)
      if (is_expert(ids[i])) s.starts[ids[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) s.starts[e + 1] += s.starts[e];
    for (int64_t i = 0; i < pairs(); i++)
      if (is_expert(ids[i])) s.order[s.starts[ids[i]]++] = i;
    for (int64_t e = experts; e > 0; e--) s.starts[e] = s.starts[e - 1];
    s.starts[0] = 0;
  }
  bool is_expert(int64_t id) const { return id >= 0 && id < experts; }

  // h = act(gate) * up. A piece of work is 16 of them of one expert, for a span of its tokens.
  void expand(const Team& team, const Space& s) const {
    const int64_t parts = (inter + kLanes - 1) / kLanes;
    int64_t expert = 0, begin = 0;  // of the expert's pieces
    for (int64_t i = 0, run = 0;; i++, run--) {
      if (run == 0) {
        i = team.shared->next.fetch_add(kRun, std::memory_order_relaxed);
        run = kRun;
      }
      int64_t rows = 0, end = begin;
      for (; expert < experts; expert++, begin = end) {
        rows = s.starts[expert + 1] - s.starts[expert];
        end = begin + (rows + kSpan - 1) / kSpan * parts;
        if (i < end) break;
      }
      if (expert == experts) return;
      const int64_t part = (i - begin) % parts, row = (i - begin) / parts * kSpan;
      expand(s, expert, part * kLanes, s.starts[expert] + row, std::min(kSpan, rows - row));
    }
  }

  void expand(const Space& s, int64_t expert, int64_t at, int64_t row, int64_t rows) const {
    const T* weights = gate_up + expert * 2 * inter * hidden;
    const int64_t count = std::min(kLanes, inter - at);
    PanelRows<T> panels{{}, hidden, at + kLanes < inter ? kLanes * hidden : 0};
    for (int64_t i = 0; i < count; i++) {
      panels.rows[i] = weights + (at + i) * hidden;
      panels.rows[kLanes + i] = weights + (inter + at + i) * hidden;
    }
    alignas(64) float sums[kSpan * kPair];
    product(sums, s.x + row * x_steps(), x_steps(), rows, panels);
    for (int64_t r = 0; r < rows; r++) {
      T* to = (T*)(s.h + (row + r) * h_steps()) + at;
      const floats h = gated(gate, load16(sums + r * kPair)) * load16(sums + r * kPair + kLanes);
      if (count == kLanes)
        store16(to, h);
      else
        store_some(to, h, count);
      if (at + count == inter) std::fill(to + count, to - at + h_steps() * PER, T{});
    }
  }

  // out = the sum of share * down(h). A thread has 32 outputs at a time, of all tokens.
  void contract(const Team& team, const Space& s) const {
    const int64_t parts = (hidden + kPair - 1) / kPair;
    for (int64_t part = team.first(parts); part < team.last(parts); part++) {
      const int64_t at = part * kPair, count = std::min(kPair, hidden - at);
      std::fill(s.sums, s.sums + tokens * kPair, 0.f);
      for (int64_t i = 0; i < pairs(); i++)  // what is no expert has no output
        if (!is_expert(ids[i])) std::fill_n(s.sums + i / k * kPair, kPair, std::nanf(""));
      for (int64_t e = 0; e < experts; e++) {
        int64_t other = e + 1;
        while (other < experts && s.starts[other + 1] == s.starts[other]) other++;
        const int64_t next = other < experts ? (other - e) * hidden * inter : 0;
        for (int64_t row = s.starts[e]; row < s.starts[e + 1]; row += kSpan)
          contract(s, e, at, count, next, row, std::min(kSpan, s.starts[e + 1] - row));
      }
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < count; i += kLanes)
          store_some(out + t * hidden + at + i, load16(s.sums + t * kPair + i), std::min(kLanes, count - i));
    }
  }

  void contract(const Space& s, int64_t expert, int64_t at, int64_t count, int64_t next, int64_t row, int64_t rows) const {
    PanelRows<T> panels{{}, inter, next};
    for (int64_t i = 0; i < count; i++) panels.rows[i] = down + (expert * hidden + at + i) * inter;
    alignas(64) float sums[kSpan * kPair];
    product(sums, s.h + row * h_steps(), h_steps(), rows, panels);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t pair = s.order[row + r];
      float* to = s.sums + pair / k * kPair;
      for (int64_t i = 0; i < kPair; i += kLanes) store16(to + i, load16(to + i) + load16(sums + r * kPair + i) * shares[pair]);
    }
  }

  void product(float* sums, const S* from, int64_t steps, int64_t rows, const PanelRows<T>& panels) const {
    alignas(64) uint32_t packed[kDeep * kPair];
    std::fill(sums, sums + rows * kPair, 0.f);
    for (int64_t first = 0; first < steps; first += kDeep) {
      const int64_t count = std::min(kDeep, steps - first);
      panels.pack(first, count, packed);
      if (tiles() && rows >= tile_rows)
        add_product_tiled(sums, (const uint32_t*)(from + first), steps, rows, packed, count);
      else
        add_product<S>(sums, from + first, steps, rows, (const S*)packed, count);
    }
  }
};

// x, gate_up, down, out: fp32 (dtype 0) or bf16 (1); rows of x are x_stride apart. The output of a token with an id that is no
// expert is NaN. tile_rows: in bf16, from how many tokens of an expert on tile registers multiply, in a library that has them; 0:
// never.
EXPORT void fused_experts(int dtype, const void* x, const void* gate_up, const void* down, const float* shares,
                          const int64_t* ids, void* out, int64_t tokens, int64_t hidden, int64_t inter, int64_t experts,
                          int64_t k, int64_t x_stride, int64_t tile_rows, int gate, int threads) {
  DISPATCH(dtype, T, {
    const FusedExperts<T> task{(const T*)x, (const T*)gate_up, (const T*)down, shares, ids, (T*)out, tokens,
                               hidden, inter, experts, k, x_stride, tile_rows, Gate(gate)};
    reserve(task.workspace(threads));
    submit(task, threads);
  })
}
