// log_mel on CUDA: the launch of csrc/log_mel_block.h, where the kernel is.
#include <algorithm>

#include "../log_mel_block.h"

namespace matpac {
namespace {

using namespace log_mel_block;

// The thread's number, read anew for every stage: kept through all of them it, or what comes of it, would spill.
__device__ __forceinline__ int thread() {
  int id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}

// As many blocks as fit on the device, each taking tile after tile: the tables are filled once a block.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads, 2) log_mel_kernel(const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Shared shared(memory);
  fill_tables(plan, shared, thread());
  const uint32_t begin = plan.first_tile(blockIdx.x, gridDim.x);
  Tile tile(plan, begin);
  Samples<In> samples;
  fetch(plan, tile, thread(), 0, samples);
  for (uint32_t left = plan.first_tile(blockIdx.x + 1, gridDim.x) - begin; left > 0; --left) {
    put_all(plan, shared, tile, thread(), samples);
    __syncthreads();
    rows(plan, shared, thread());
    __syncthreads();
    columns(shared, thread());
    // The next tile's samples come while this one's mels are summed.
    if (left > 1) fetch(plan, tile.next(plan), thread(), 0, samples);
    __syncthreads();
    mels<Out>(plan, shared, tile, thread());
    tile = tile.next(plan);
    __syncthreads();
  }
}

template <typename In, typename Out>
void launch(const Plan& plan, int device, cudaStream_t stream) {
  const auto kernel = log_mel_kernel<In, Out>;
  const int bytes = plan.shared_bytes();
  int processors = 0;
  cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "log_mel");
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "log_mel");
  const unsigned blocks = std::min<unsigned>(plan.tiles, 2 * unsigned(processors));
  kernel<<<blocks, kThreads, bytes, stream>>>(plan);
  cuda_check(cudaGetLastError(), "log_mel");
}

}  // namespace

void log_mel_cuda(const LogMelArgs& args, int device, void* stream) {
  if (args.batch == 0) return;
  const DeviceGuard guard(device);
  const Plan plan(args);
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool narrow = args.out_dtype == DType::bfloat16;
  const auto run = [&](auto in) {
    using In = decltype(in);
    narrow ? launch<In, BFloat16>(plan, device, queue) : launch<In, float>(plan, device, queue);
  };
  args.wave_dtype == DType::float32 ? run(float()) : run(int16_t());
}

}  // namespace matpac
