// Causal attention over block tables, with a running softmax over chunks of keys (Milakov and Gimelshein 2018; Dao et al.
// 2022). Caches are [blocks, kv_heads, block_size, head_size]. All query heads of a kv head share the keys and values that
// were loaded. There are two ways:
//
//   many rows (prefill.h): a piece of work is one kv head of one sequence and a span of its queries.
//   few rows (decode.h): a piece is one kv head of one sequence and a span of its keys; the pieces' softmaxes are merged at
//   the end.
//
// The way, the spans and the order of sums depend on the sequence alone: its result does not depend on the batch.
#include "decode.h"
#include "prefill.h"

static const int64_t kKeySpan = 128;  // few rows: keys of a piece of work
static const int64_t kRowSpan = 192;  // many rows: rows of a piece of work

struct Item {
  int32_t seq, kv_head, first, last;  // queries of a span of many rows, or keys of a span of few
  int64_t part;                       // few rows: where in the workspace
};
struct Merge {
  int32_t seq, kv_head;
  int64_t count, part;
};

// What there is to do. Every thread makes the same lists for itself.
struct Lists {
  std::vector<Item> spans, keys;
  std::vector<Merge> merges;
  int64_t used;  // floats of the workspace

  void fill(const Paged& p) {
    spans.clear();
    keys.clear();
    merges.clear();
    used = 0;
    const int32_t step = int32_t(std::max<int64_t>(1, kRowSpan / p.group()));
    for (int32_t s = 0; s < p.seqs; s++) {
      const int32_t queries = int32_t(p.queries(s)), length = p.seq_lens[s];
      const int64_t rows = queries * p.group();
      if (rows > kFewRows || p.head_size % 32) {
        // the last spans have the most keys: they go first
        for (int32_t first = (queries - 1) / step * step; first >= 0 && queries > 0; first -= step)
          for (int32_t h = 0; h < p.kv_heads; h++) spans.push_back({s, h, first, std::min(queries, first + step), 0});
      } else if (rows > 0) {
        const int32_t begin = int32_t(p.first_seen(p.offset(s)));
        for (int32_t h = 0; h < p.kv_heads; h++) {
          merges.push_back({s, h, 0, used});
          for (int32_t from = begin; from < length; from += kKeySpan, merges.back().count++) {
            keys.push_back({s, h, from, std::min(length, from + int32_t(kKeySpan)), used});
            used += rows * (2 + p.head_size);
          }
        }
      }
    }
  }
};

// By: how many rows are multiplied, as Span takes it.
template <typename T, typename By>
struct Attention {
  Paged p;
  int64_t tokens;

  int64_t work() const {
    int64_t products = 0;
    for (int64_t s = 0; s < p.seqs; s++) products += p.queries(s) * p.heads * p.seq_lens[s] * p.head_size;
    return products;
  }

  void run(const Team& team) const {
    static thread_local Lists lists;
    lists.fill(p);
    if (team.index == 0) {
      const int64_t row = p.heads * p.head_size, last = p.query_start[p.seqs];
      std::memset((T*)p.out + last * row, 0, size_t((tokens - last) * row) * sizeof(T));  // padding
      std::vector<float>& space = team.shared->workspace;
      if (int64_t(space.size()) < lists.used) space.resize(size_t(lists.used));
      team.shared->next.store(0, std::memory_order_relaxed);
    }
    team.barrier();
    float* parts = team.shared->workspace.data();
    few(team, lists.keys, parts);
    many(team, lists.spans);
    if (lists.merges.empty()) return;
    team.barrier();
    const int64_t count = int64_t(lists.merges.size());
    for (int64_t i = team.first(count); i < team.last(count); i++) {
      const Merge& m = lists.merges[size_t(i)];
      merge<T>(p, m.seq, m.kv_head, m.count, parts + m.part);
    }
  }

  // A run of the items each, of about as many keys.
  void few(const Team& team, const std::vector<Item>& items, float* parts) const {
    int64_t keys = 0;
    for (const Item& item : items) keys += item.last - item.first;
    const int64_t first = team.first(keys), last = team.last(keys);
    size_t i = 0;
    int64_t seen = 0;
    for (; i < items.size() && seen < first; i++) seen += items[i].last - items[i].first;
    Chunk<T> chunks[2], *here = &chunks[0], *there = &chunks[1];
    const auto find = [&](Chunk<T>& chunk, size_t at) {
      const Item& it = items[std::min(at, items.size() - 1)];
      chunk.find(p, it.seq, it.kv_head, it.first, it.last);
    };
    if (!items.empty()) find(*here, i);
    for (; i < items.size() && seen < last; i++) {
      const Item& it = items[i];
      seen += it.last - it.first;
      const KeySpan<T> span(p, it.seq, it.kv_head);
      span.run(it.first, it.last, (Softmax*)(parts + it.part), parts + it.part + 2 * span.rows, here, there,
               [&](Chunk<T>& next) { find(next, i + 1); });
    }
  }

  void many(const Team& team, const std::vector<Item>& items) const {
    if (items.empty()) return;
    Span<T, By> span(p);
    By::begin();
    for (;;) {
      const int64_t i = team.shared->next.fetch_add(1, std::memory_order_relaxed);
      if (i >= int64_t(items.size())) break;
      const Item& it = items[size_t(i)];
      span.run(it.seq, it.kv_head, it.first, it.last);
    }
    By::end();
  }
};

// q: [tokens, heads, head_size], rows q_stride apart. Rows beyond the last query are padding: their output is 0. tiled: many
// rows by tile registers, which a library has or not (has_tiles), for bf16 alone.
EXPORT void paged_attention(int dtype, const void* q, const void* keys, const void* values, void* out,
                            const int32_t* query_start, const int32_t* seq_lens, const int32_t* block_table,
                            int64_t tokens, int64_t seqs, int64_t heads, int64_t kv_heads, int64_t head_size,
                            int64_t block_size, int64_t table_stride, int64_t q_stride, float scale, float soft_cap,
                            int64_t window, int tiled, int threads) {
  const Paged p{q, keys, values, out, query_start, seq_lens, block_table, seqs, heads, kv_heads,
                head_size, block_size, table_stride, q_stride, scale, soft_cap, window};
#if defined(__AMX_TILE__) || defined(EMULATE_TILES)
  if (tiled && dtype == 1) {
    submit(Attention<bf16, ByTiles>{p, tokens}, threads);
    return;
  }
#endif
  DISPATCH(dtype, T, {
    typedef ByRegisters<typename Operand<T>::type> By;
    submit(Attention<T, By>{p, tokens}, threads);
  })
}
