// Sampling with top-k, top-p and min-p without sorting the vocabulary: tokens are counted and weighed in bins of like
// logits, and only the bins in which a cut or the draw falls are sorted.
#include "task.h"

static const int kBins = 2048;
static const float kMasked = -1e30f;     // tokens below have no chance
static const float kBinsPerUnit = 64.f;  // 32 units of logit in all; what lies below shares the last bin

struct Entry {
  float logit;
  int32_t id;
  // the order of falling probability, the lower id first among equals
  bool operator<(const Entry& other) const { return logit != other.logit ? logit > other.logit : id < other.id; }
};

struct Bin {
  int64_t count;
  double mass;
};

// Where a walk in order of falling probability stops: before entry `place` of bin `bin`, with `mass` behind it.
struct Cut {
  int bin;
  int64_t place;
  double mass;
};

struct Row {
  const float* logits;
  int64_t n;
  float best = 0.f;
  std::vector<float> weights;   // [n] exp(logit - best)
  std::vector<int32_t> bin_of;  // [n], kBins for masked tokens (minus infinity)
  std::vector<Bin> bins;        // [kBins + 1]
  std::vector<Entry> entries;   // of the bin sorted last

  void weigh() {
    best = logits[0];
#pragma omp simd reduction(max : best)
    for (int64_t i = 1; i < n; i++) best = logits[i] > best ? logits[i] : best;
    weights.resize(size_t(n));
    bin_of.resize(size_t(n));
    float* w = weights.data();
    int32_t* b = bin_of.data();
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t count = std::min(kLanes, n - i);
      const floats v = count == kLanes ? load16(logits + i) : load_some(logits + i, count);
      floats depth = (best - v) * kBinsPerUnit;
      depth = depth < float(kBins - 1) ? depth : splat(float(kBins - 1));
      const ints bin = v > kMasked ? __builtin_convertvector(depth, ints) : ints{} + kBins;
      const floats weight = fast_exp(v - best);
      std::memcpy(b + i, &bin, size_t(count) * 4);
      std::memcpy(w + i, &weight, size_t(count) * 4);
    }
    bins.assign(kBins + 1, Bin{0, 0.0});
    for (int64_t i = 0; i < n; i++) {
      bins[size_t(b[i])].count++;
      bins[size_t(b[i])].mass += double(w[i]);
    }
  }

  void sort(int bin) {
    entries.clear();
    for (int64_t i = 0; i < n; i++)
      if (bin_of[size_t(i)] == bin) entries.push_back({logits[i], int32_t(i)});
    std::sort(entries.begin(), entries.end());
  }
  double weight(const Entry& e) const { return double(weights[size_t(e.id)]); }

  // The k-th largest and all that equal it.
  Cut top_k(int64_t k) {
    Cut cut{0, 0, 0.0};
    int64_t seen = 0;
    for (; cut.bin < kBins; cut.bin++) {
      const Bin& bin = bins[size_t(cut.bin)];
      if (seen + bin.count >= k && bin.count > 0) break;
      seen += bin.count;
      cut.mass += bin.mass;
    }
    if (cut.bin == kBins) return cut;
    sort(cut.bin);
    const int64_t count = int64_t(entries.size());
    const float threshold = entries[size_t(k - seen - 1)].logit;
    for (; cut.place < count && entries[size_t(cut.place)].logit >= threshold; cut.place++)
      cut.mass += weight(entries[size_t(cut.place)]);
    return cut;
  }

  // Within `limit`: the fewest whose mass reaches `wanted`, of these those of at least `lightest`.
  Cut top_p(const Cut& limit, double wanted, double lightest) {
    Cut cut{0, 0, 0.0};
    const int deepest = lightest <= 0 ? kBins : int(std::min(-std::log(lightest) * kBinsPerUnit, double(kBins)));
    // two bins early: logits were rounded when they were binned
    for (; cut.bin < limit.bin && cut.bin < deepest - 2; cut.bin++) {
      if (cut.mass + bins[size_t(cut.bin)].mass >= wanted) break;
      cut.mass += bins[size_t(cut.bin)].mass;
    }
    for (; cut.bin <= limit.bin && cut.bin < kBins; cut.bin++) {
      if (bins[size_t(cut.bin)].count == 0) continue;
      sort(cut.bin);
      const int64_t end = cut.bin == limit.bin ? limit.place : int64_t(entries.size());
      for (cut.place = 0; cut.place < end; cut.place++) {
        const double w = weight(entries[size_t(cut.place)]);
        if (cut.mass > 0 && (cut.mass >= wanted || w < lightest)) return cut;
        cut.mass += w;
      }
      if (cut.mass >= wanted) return cut;
    }
    return limit;
  }

  // The first token, in order, with which the running mass exceeds `target`; the last before `limit` at the latest.
  int64_t draw(const Cut& limit, double target) {
    double mass = 0.0;
    int last = 0;  // the last bin that holds a token
    for (int bin = 0; bin < limit.bin || (bin == limit.bin && limit.place > 0); bin++) {
      if (bins[size_t(bin)].count == 0) continue;
      last = bin;
      if (bin == limit.bin || mass + bins[size_t(bin)].mass > target) break;
      mass += bins[size_t(bin)].mass;
    }
    sort(last);
    const int64_t end = last == limit.bin ? limit.place : int64_t(entries.size());
    for (int64_t i = 0; i < end; i++) {
      mass += weight(entries[size_t(i)]);
      if (mass > target) return entries[size_t(i)].id;
    }
    return entries[size_t(end - 1)].id;
  }

  int64_t sample(int64_t k, float p, float min_p, float uniform) {
    weigh();
    if (bins[kBins].count == n) return 0;  // all are masked
    Cut cut{kBins, 0, 0.0};
    if (k < n) {
      cut = top_k(std::max<int64_t>(k, 1));
    } else {
      for (int bin = 0; bin < kBins; bin++) cut.mass += bins[size_t(bin)].mass;
    }
    if (p < 1.f || min_p > 0.f) cut = top_p(cut, p < 1.f ? double(p) * cut.mass : HUGE_VAL, double(min_p));
    return draw(cut, double(uniform) * cut.mass);
  }
};

struct Draws {
  const float* logits;
  const int64_t* top_k;
  const float *top_p, *min_p, *uniform;
  int64_t* out;
  int64_t rows, n, stride;
  int64_t work() const { return rows > 1 ? rows * n : 0; }
  void run(const Team& team) const {
    static thread_local Row row;
    for (int64_t r = team.first(rows); r < team.last(rows); r++) {
      row.logits = logits + r * stride;
      row.n = n;
      out[r] = row.sample(top_k[r], top_p[r], min_p[r], uniform[r]);
    }
  }
};

EXPORT void top_k_top_p_sample(const float* logits, const int64_t* top_k, const float* top_p, const float* min_p,
                               const float* uniform, int64_t* out, int64_t rows, int64_t n, int64_t stride,
                               int threads) {
  submit(Draws{logits, top_k, top_p, min_p, uniform, out, rows, n, stride}, threads);
}
