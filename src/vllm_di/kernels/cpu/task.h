// How kernels run: as tasks on a team of threads, at once or recorded on a tape that replays many of them in one call.
//
// A task is a struct with `int64_t work() const`, about how many multiplications it takes, and `void run(const Team&) const`,
// which every thread of the team enters. It holds plain pointers: a replay reads whatever they point to by then.
#pragma once
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <memory>

#include "common.h"

static const int64_t kSerial = 1 << 15;  // work below which threads cost more than they bring
static const int kSpins = 1 << 11;       // pauses, 40 to 100 us: threads with cores of their own meet within that

// What the threads of a team share.
struct Shared {
  std::atomic<int> waiting{0}, asleep{0};
  std::atomic<uint32_t> round{0};
  std::atomic<int64_t> next{0};  // of work that is handed out piece by piece
  std::vector<float> workspace;
};

struct Team {
  int index, count;
  Shared* shared;

  // All threads wait for the last: they spin for a moment, then sleep. On a busy host the last one may need the core of one
  // that spins, and the scheduler owes more to a thread that slept.
  void barrier() const {
    if (count == 1) return;
    const uint32_t round = shared->round.load(std::memory_order_relaxed);
    if (shared->waiting.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      shared->waiting.store(0, std::memory_order_relaxed);
      shared->round.store(round + 1);  // in one order with `asleep`: either it is seen there, or this here
      if (shared->asleep.load()) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
      return;
    }
    for (int spins = 0; shared->round.load(std::memory_order_acquire) == round; spins++) {
      if (spins < kSpins) {
        relax();
        continue;
      }
      shared->asleep.fetch_add(1);
      futex(FUTEX_WAIT_PRIVATE, round);  // returns at once when the round is over
      shared->asleep.fetch_sub(1);
    }
  }
  void futex(int operation, uint32_t value) const {
    syscall(SYS_futex, &shared->round, operation, value, nullptr, nullptr, 0);
  }
  // This thread's run of [0, n).
  int64_t first(int64_t n) const { return n * index / count; }
  int64_t last(int64_t n) const { return n * (index + 1) / count; }
};

struct Recorded {
  virtual ~Recorded() {}
  virtual bool is_small() const = 0;
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
      bool is_small() const override { return task.work() < kSerial; }
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
