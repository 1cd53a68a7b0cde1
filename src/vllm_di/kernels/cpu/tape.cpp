// Tapes: record the tasks that a thread submits, and replay them with one team. Small tasks run on its first thread, as they
// do when they are submitted; a barrier stands between any two of which one is not small.
#include "task.h"

thread_local Tape* recording = nullptr;

Shared* shared_of_caller() {
  static thread_local Shared shared;
  return &shared;
}

// Until tape_stop, what this thread submits runs and is recorded too.
EXPORT void* tape_start() { return recording = new Tape; }
EXPORT void tape_stop() { recording = nullptr; }
EXPORT void tape_free(void* tape) { delete (Tape*)tape; }

EXPORT void tape_replay(const void* handle, int threads) {
  const Tape& tape = *(const Tape*)handle;
  Shared* shared = shared_of_caller();
  if (shared->workspace.size() < tape.workspace) shared->workspace.resize(tape.workspace);
  const size_t count = tape.tasks.size();
  static thread_local std::vector<char> small_tasks;
  small_tasks.resize(count);
  bool all_small = true;
  for (size_t i = 0; i < count; i++) all_small &= small_tasks[i] = threads == 1 || tape.tasks[i]->is_small();
  if (all_small) {
    for (const auto& task : tape.tasks) task->run(Team{0, 1, shared});
    return;
  }
  const char* is_small = small_tasks.data();  // of this thread: the team's others have vectors of their own
#pragma omp parallel num_threads(threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads(), shared};
    for (size_t i = 0; i < count; i++) {
      if (!is_small[i])
        tape.tasks[i]->run(team);
      else if (team.index == 0)
        tape.tasks[i]->run(Team{0, 1, shared});
      if (i + 1 == count || !is_small[i] || !is_small[i + 1]) team.barrier();
    }
  }
}
