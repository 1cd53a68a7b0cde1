// Tapes: record the tasks that a thread submits, and replay them with one team and a barrier between any two.
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
#pragma omp parallel num_threads(threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads(), shared};
    for (const auto& task : tape.tasks) {
      task->run(team);
      team.barrier();
    }
  }
}
