// parallel_for: the threads of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace matpac {

// Calls work(context, part) once for every part in [0, parts), on at most `threads` threads, the calling one among
// them.
void run_parts(int64_t parts, int threads, void (*work)(const void* context, int64_t part), const void* context);

// Runs fn(begin, end) over [0, n) in at most `threads` contiguous parts of at least `grain` items. fn must not throw.
// A second thread costs microseconds where torch's are awake, and what the system takes to wake one where they sleep.
template <typename Fn>
void parallel_for(int64_t n, int64_t grain, int threads, const Fn& fn) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(1, grain)));
  const auto range = [&](int64_t part) { fn(n * part / parts, n * (part + 1) / parts); };
  using Range = decltype(range);
  if (parts == 1) return range(0);
  run_parts(parts, threads, [](const void* context, int64_t part) { (*static_cast<Range*>(context))(part); }, &range);
}

}  // namespace matpac
