// The CUDA kernel of log_mel on the host, block by block and thread by thread, for tests on machines without a GPU: the
// very source that nvcc compiles, with the same index arithmetic and the same operations.
#include <limits>
#include <vector>

#include "../log_mel_block.h"

namespace matpac {
namespace {

using namespace log_mel_block;

template <typename In, typename Out>
void emulate(const Plan& plan, int blocks, bool backwards) {
  const auto each = [&](const auto& step) {
    for (int i = 0; i < kThreads; ++i) step(backwards ? kThreads - 1 - i : i);
  };
  for (uint32_t block = 0; block < uint32_t(blocks); ++block) {
    // What a kernel finds in shared memory is arbitrary; here it is NaN. Of int64, for the alignment of the tables.
    std::vector<int64_t> memory(size_t(plan.shared_bytes()) / sizeof(int64_t) + 2, -1);
    const auto address = (reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16;
    const Shared shared(reinterpret_cast<void*>(address));
    each([&](int thread) { fill_tables(plan, shared, thread); });
    std::vector<Samples<In>> samples(kThreads);  // registers
    const uint32_t begin = plan.first_tile(block, uint32_t(blocks));
    const uint32_t end = plan.first_tile(block + 1, uint32_t(blocks));
    Tile tile(plan, begin);
    const auto fetch_first = [&](const Tile& from) {
      each([&](int thread) { fetch(plan, from, thread, 0, samples[size_t(thread)]); });
    };
    if (begin < end) fetch_first(tile);
    for (uint32_t i = begin; i < end; ++i) {
      each([&](int thread) { put_all(plan, shared, tile, thread, samples[size_t(thread)]); });
      each([&](int thread) { rows(plan, shared, thread); });
      each([&](int thread) { columns(shared, thread); });
      if (i + 1 < end) fetch_first(tile.next(plan));
      each([&](int thread) { mels<Out>(plan, shared, tile, thread); });
      tile = tile.next(plan);
    }
  }
}

}  // namespace

std::vector<int> log_mel_places() {
  std::vector<int> places(kBins);
  for (int column = 0; column < kColumns; ++column) {
    for (int j = 0; j < (column == 0 ? kColumnPoints / 2 + 1 : kColumnPoints); ++j) {
      places[size_t(bin_of(column, j))] = place_of(column, j);
    }
  }
  return places;
}

void log_mel_emulated(const LogMelArgs& args, int blocks, bool backwards) {
  const Plan plan(args);
  const bool narrow = args.out_dtype == DType::bfloat16;
  const auto run = [&](auto in) {
    using In = decltype(in);
    narrow ? emulate<In, BFloat16>(plan, blocks, backwards) : emulate<In, float>(plan, blocks, backwards);
  };
  args.wave_dtype == DType::float32 ? run(float()) : run(int16_t());
}

}  // namespace matpac
