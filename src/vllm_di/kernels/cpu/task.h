// How kernels run: as tasks on a team of threads, at once or recorded on a tape that replays many of them in one call.
//
// A task is a struct with `int64_t work() const`, about how many multiplications it takes, and `void run(const Team&) const`,
// which every thread of the team enters. It holds plain pointers: a replay reads whatever they point to by then.
#pragma once
#include <omp.h>

#include <atomic>
#include <memory>
#include <thread>

#include "common.h"

static const int64_t kSerial = 1 << 15;  // work below which threads cost more than they bring

// What the threads of a team share.
struct Shared {
  std::atomic<int> waiting{0};
  std::atomic<uint32_t> round{0};
  std::atomic<int64_t> next{0};  // of work that is handed out piece by piece
  std::vector<float> workspace;
};

struct Team {
  int index, count;
  Shared* shared;

  // All threads wait for the last.
  void barrier() const {
    if (count == 1) return;
    const uint32_t round = shared->round.load(std::memory_order_relaxed);
    if (shared->waiting.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      shared->waiting.store(0, std::memory_order_relaxed);
      shared->round.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; shared->round.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 1 << 14)
        std::this_thread::yield();  // more threads than cores, or a stopped one
      else
        __builtin_ia32_pause();
    }
  }
  // This thread's run of [0, n).
  int64_t first(int64_t n) const { return n * index / count; }
  int64_t last(int64_t n) const { return n * (index + 1) / count; }
};

struct Recorded {
  virtual ~Recorded() {}
  virtual void run(const Team& team) const = 0;
};

struct Tape {
  std::vector<std::unique_ptr<Recorded>> tasks;
  size_t workspace = 0;
};
extern thread_local Tape* recording;  // null: tasks only run
Shared* shared_of_caller();

// Before a task that uses as many floats of the workspace is submitted.
static inline void reserve(size_t floats) {
  std::vector<float>& space = shared_of_caller()->workspace;
  if (space.size() < floats) space.resize(floats);
  if (recording) recording->workspace = std::max(recording->workspace, floats);
}

template <typename Task>
static void submit(const Task& task, int threads) {
  if (recording) {
    struct Kept : Recorded {
      Task task;
      explicit Kept(const Task& kept) : task(kept) {}
      void run(const Team& team) const override { task.run(team); }
    };
    recording->tasks.emplace_back(new Kept(task));
  }
  Shared* shared = shared_of_caller();
  if (threads == 1 || task.work() < kSerial) {
    task.run(Team{0, 1, shared});
    return;
  }
#pragma omp parallel num_threads(threads)
  task.run(Team{omp_get_thread_num(), omp_get_num_threads(), shared});
}
