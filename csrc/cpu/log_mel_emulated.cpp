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
    for (uint32_t i = block; i < plan.tiles; i += uint32_t(blocks)) {
      const Tile tile(plan, i);
      each([&](int thread) { load<In>(plan, shared, tile, thread); });
      each([&](int thread) { rows(plan, shared, thread); });
      each([&](int thread) { columns(shared, thread); });
      each([&](int thread) { mels<Out>(plan, shared, tile, thread); });
    }
  }
}

}  // namespace

void log_mel_emulated(const LogMelArgs& args, int blocks, bool backwards) {
  const Plan plan(args);
  const bool narrow = args.out_dtype == DType::bfloat16;
  dispatch<float, int16_t>(args.wave_dtype, "log_mel", [&](auto in) {
    using In = decltype(in);
    narrow ? emulate<In, BFloat16>(plan, blocks, backwards) : emulate<In, float>(plan, blocks, backwards);
  });
}

}  // namespace matpac
