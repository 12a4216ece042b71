// Threads belong to the host framework: the core asks for tasks to be run and never starts a thread.
#pragma once

#include <cstdint>
#include <type_traits>

namespace daco {

// `run` must call body(arg, task) once for every task in [0, tasks), in any order and on any thread,
// and return when all have finished. `threads` is how many it expects to run at once (at least 1).
struct Executor {
  void* context = nullptr;
  int threads = 1;
  void (*run)(void* context, int64_t tasks, void (*body)(void* arg, int64_t task), void* arg) = nullptr;

  // Runs everything on the calling thread.
  static Executor serial();
};

// Adapts a callable f(int64_t task) to the C interface above; runs inline when one task is left.
template <class F>
void parallel_for(const Executor& executor, int64_t tasks, F&& f) {
  if (tasks <= 0) return;
  if (tasks == 1 || executor.run == nullptr || executor.threads <= 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t);
    return;
  }
  using Body = F;
  executor.run(
      executor.context, tasks,
      [](void* arg, int64_t task) { (*static_cast<std::remove_reference_t<Body>*>(arg))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

inline Executor Executor::serial() { return Executor{}; }

}  // namespace daco
