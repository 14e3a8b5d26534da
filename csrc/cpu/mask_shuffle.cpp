// mask_shuffle on the CPU; matpac_fast/reference.py defines the bits.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common.h"
#include "../ops.h"
#include "threads.h"

namespace matpac {
namespace {

uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

void mask_shuffle_cpu(int64_t base, const int64_t* index, int64_t batch, int64_t n_tokens, int64_t* out, int threads) {
  uint64_t low = 1;  // the low bits of a key hold the token
  while (low < uint64_t(n_tokens - 1)) low = low << 1 | 1;
  // Flipping the top bit makes the order of unsigned keys that of the definition's signed ones.
  constexpr uint64_t sign = uint64_t(1) << 63;
  std::vector<uint64_t> keys(size_t(batch) * size_t(n_tokens));

  const int64_t rows_worth_a_thread = 1 + 4096 / n_tokens;
  parallel_for(batch, rows_worth_a_thread, threads, [&, low](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint64_t* key = keys.data() + row * n_tokens;
      const uint64_t stream = splitmix64(uint64_t(base) ^ uint64_t(index[row]));
      for (int64_t token = 0; token < n_tokens; ++token) {
        const uint64_t noise = splitmix64(stream + uint64_t(token));
        key[token] = ((noise & ~low) | uint64_t(token)) ^ sign;
      }
      std::sort(key, key + n_tokens);
      for (int64_t place = 0; place < n_tokens; ++place) out[row * n_tokens + place] = int64_t(key[place] & low);
    }
  });
}

}  // namespace matpac
