// Sampling with top-k, top-p and min-p without sorting the vocabulary: a heap gives the likeliest tokens one by one, and few
// are ever taken.
#include "common.h"

struct Entry {
  float logit;
  int32_t id;
  // the order of falling probability, the lower id first among equals
  bool operator<(const Entry& other) const {
    return logit != other.logit ? logit < other.logit : id > other.id;
  }
};

static int64_t sample_row(const float* logits, int64_t n, int64_t top_k, float top_p, float min_p,
                          float uniform, std::vector<Entry>& heap) {
  heap.clear();
  float best = logits[0];
  for (int64_t i = 1; i < n; i++) best = std::max(best, logits[i]);
  const float lowest = -1e30f;  // masked tokens lie below
  for (int64_t i = 0; i < n; i++)
    if (logits[i] > lowest) heap.push_back({logits[i], int32_t(i)});
  if (heap.empty()) return 0;
  if (top_k < int64_t(heap.size())) {
    auto nth = heap.begin() + (std::max<int64_t>(top_k, 1) - 1);
    std::nth_element(heap.begin(), nth, heap.end(), [](const Entry& a, const Entry& b) { return b < a; });
    const float threshold = nth->logit;  // ties at the threshold stay
    heap.erase(std::remove_if(heap.begin(), heap.end(), [&](const Entry& e) { return e.logit < threshold; }),
               heap.end());
  }
  double total = 0;
  for (const Entry& e : heap) total += std::exp(double(e.logit - best));
  std::make_heap(heap.begin(), heap.end());
  // what is kept, in order, with its running mass
  std::vector<std::pair<double, int32_t>> kept;
  double mass = 0;
  const bool open = top_p >= 1.f && min_p <= 0.f;  // nothing is cut: stop where the draw falls
  const double target = uniform * total;
  auto end = heap.end();
  while (end != heap.begin()) {
    const Entry e = heap.front();
    const double p = std::exp(double(e.logit - best));
    if (!kept.empty() && (mass >= double(top_p) * total || p < double(min_p))) break;
    mass += p;
    kept.push_back({mass, e.id});
    if (open && mass > target) return e.id;
    std::pop_heap(heap.begin(), end);
    --end;
  }
  const double draw = uniform * mass;
  for (const auto& [running, id] : kept)
    if (running > draw) return id;
  return kept.back().second;
}

EXPORT void top_k_top_p_sample(const float* logits, const int64_t* top_k, const float* top_p,
                               const float* min_p, const float* uniform, int64_t* out, int64_t rows,
                               int64_t n, int64_t stride, int threads) {
#pragma omp parallel num_threads(threads) if (rows > 1)
  {
    std::vector<Entry> heap;
    heap.reserve(size_t(n));
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < rows; r++)
      out[r] = sample_row(logits + r * stride, n, top_k[r], top_p[r], min_p[r], uniform[r], heap);
  }
}
