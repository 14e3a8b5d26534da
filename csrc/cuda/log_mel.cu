// log_mel on CUDA: the launch of csrc/log_mel_block.h, where the kernel is.
#include <algorithm>

#include "../log_mel_block.h"

namespace matpac {
namespace {

using namespace log_mel_block;

// As many blocks as fit on the device, each taking tile after tile: the tables are filled once a block.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads, 2) log_mel_kernel(const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Shared shared(memory);
  const int thread = int(threadIdx.x);
  fill_tables(plan, shared, thread);
  for (uint32_t i = blockIdx.x; i < plan.tiles; i += gridDim.x) {
    const Tile tile(plan, i);
    load<In>(plan, shared, tile, thread);
    __syncthreads();
    rows(plan, shared, thread);
    __syncthreads();
    columns(shared, thread);
    __syncthreads();
    mels<Out>(plan, shared, tile, thread);
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
  dispatch<float, int16_t>(args.wave_dtype, "log_mel", [&](auto in) {
    using In = decltype(in);
    narrow ? launch<In, BFloat16>(plan, device, queue) : launch<In, float>(plan, device, queue);
  });
}

}  // namespace matpac
