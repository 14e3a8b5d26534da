#include "threads.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace matpac {
namespace {

// What a compiler calls for `#pragma omp parallel`: member(context) on every thread of a team of at most `threads`.
using GompParallel = void (*)(void (*member)(void*), void* context, unsigned threads, unsigned flags);

// The OpenMP of torch itself, found among what its library links, whichever others are loaded; null where it has none.
// Threads of our own would start on cores where torch's still spin, waiting for torch's next operation.
GompParallel torch_openmp() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch ? reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel")) : nullptr;
}

// A child that is forked from here on has none of OpenMP's threads and would wait for them without end.
const pid_t loaded_in = getpid();

struct Team {
  const int64_t parts;
  void (*const work)(const void*, int64_t);
  const void* const context;
  std::atomic<int64_t> next{0};
};

// A team may be smaller than asked for, so its members take parts until there is none.
void member(void* pointer) {
  Team& team = *static_cast<Team*>(pointer);
  for (int64_t part; (part = team.next.fetch_add(1, std::memory_order_relaxed)) < team.parts;) {
    team.work(team.context, part);
  }
}

}  // namespace

void run_parts(int64_t parts, int threads, void (*work)(const void*, int64_t), const void* context) {
  static const GompParallel openmp = torch_openmp();
  Team team{parts, work, context};
  // A team of all that torch has, also for fewer parts: OpenMP would end the others, and torch start them again.
  if (openmp && getpid() == loaded_in) return openmp(member, &team, unsigned(threads), 0);

  std::vector<std::thread> workers;
  workers.reserve(size_t(parts - 1));
  try {
    while (int64_t(workers.size()) < parts - 1) workers.emplace_back(member, &team);
  } catch (const std::exception&) {
    // no more threads to be had: those there are do the rest
  }
  member(&team);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace matpac
