// The memory movement of masked_patch_embed on the CPU; the matrix product between the two is torch's.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "../common.h"
#include "../ops.h"
#include "threads.h"

namespace matpac {
namespace {

// One patch, row by row: LINE bytes a row where that is known at compile time, else `line`.
template <size_t LINE>
void copy_patch(char* to, const char* from, int64_t stride, int64_t rows, size_t line) {
  const size_t bytes = LINE ? LINE : line;
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + size_t(row) * bytes, from + row * stride, bytes);
}

}  // namespace

bool patch_gather_cpu(const PatchGatherArgs& a, int threads) {
  const int64_t size = a.itemsize;
  const size_t line = size_t(a.patch * size);
  const int64_t patch_bytes = a.patch * a.patch * size;
  const int64_t token_bytes = a.width * size;
  const auto copy = line == 64 ? copy_patch<64> : line == 32 ? copy_patch<32> : copy_patch<0>;
  std::atomic<bool> in_range{true};

  const int64_t rows = 1 + a.count;  // of a sample, the CLS row first
  const int64_t sample_bytes = rows * (patch_bytes + (a.tokens ? token_bytes : 0)) + 1;
  const int64_t samples_worth_a_thread = 1 + (1 << 18) / sample_bytes;
  parallel_for(a.batch, samples_worth_a_thread, threads, [&, copy](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const char* spec = static_cast<const char*>(a.spec) + b * a.batch_stride * size;
      const char* table = static_cast<const char*>(a.table);
      const int64_t* ids = a.ids + b * a.ids_stride;
      char* patches = static_cast<char*>(a.patches) + b * rows * patch_bytes;
      char* tokens = a.tokens ? static_cast<char*>(a.tokens) + b * rows * token_bytes : nullptr;
      std::memset(patches, 0, size_t(patch_bytes));
      if (tokens) std::memcpy(tokens, table, size_t(token_bytes));
      for (int64_t row = 1; row < rows; ++row) {
        const int64_t id = ids[row - 1];
        if (id < 0 || id >= a.grid_freq * a.grid_time) {
          in_range.store(false, std::memory_order_relaxed);
          return;
        }
        const int64_t corner = id / a.grid_time * a.patch * a.freq_stride + id % a.grid_time * a.patch;
        copy(patches + row * patch_bytes, spec + corner * size, a.freq_stride * size, a.patch, line);
        if (tokens) std::memcpy(tokens + row * token_bytes, table + (1 + id) * token_bytes, size_t(token_bytes));
      }
    }
  });
  return in_range.load();
}

}  // namespace matpac
