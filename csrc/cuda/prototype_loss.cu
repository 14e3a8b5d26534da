// prototype_loss on CUDA: the kernels of prototype_rows.h and their launches.
#include <type_traits>

#include "../prototype_rows.h"

namespace matpac {
namespace {

using namespace prototype;

// A block on the device: every thread holds its own state in registers.
template <class StateT, int kThreads>
struct DeviceBlock {
  static constexpr int threads = kThreads;
  StateT me;

  __device__ DeviceBlock() { me.id = int(threadIdx.x); }
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int64_t count() const { return gridDim.x; }

  template <class Fn>
  __device__ __forceinline__ void each(const Fn& fn) {
    fn(me);
  }

  // Within each warp by butterfly, which leaves the same bits in every lane, then the same over the warps.
  template <class Op, int n, int slot>
  __device__ __forceinline__ void all() {
    constexpr int warps = kThreads / 32;
    using T = std::remove_reference_t<decltype(me.reduce[0])>;
    __shared__ T part[n][warps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < n; ++i) {
      for (int offset = 16; offset; offset /= 2)
        me.reduce[i] = Op::of(me.reduce[i], __shfl_xor_sync(0xffffffffu, me.reduce[i], offset));
      if (lane == 0) part[i][warp] = me.reduce[i];
    }
    __syncthreads();
    for (int i = 0; i < n; ++i) {
      me.reduce[i] = part[i][lane % warps];
      for (int offset = warps / 2; offset; offset /= 2)
        me.reduce[i] = Op::of(me.reduce[i], __shfl_xor_sync(0xffffffffu, me.reduce[i], offset));
    }
  }

  __device__ __forceinline__ double* shared() {
    __shared__ double memory[kThreads];
    return memory;
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads) prototype_loss_registers_kernel(const Rows<float> rows) {
  DeviceBlock<RowState<float>, kThreads> block;
  forward_in_registers(block, rows);
}

template <typename T>
__global__ void __launch_bounds__(kPassThreads, 1) prototype_loss_passes_kernel(const Rows<T> rows) {
  DeviceBlock<PassState<T>, kPassThreads> block;
  forward_in_passes(block, rows);
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads) prototype_loss_delta_kernel(const Rows<T> rows) {
  DeviceBlock<State<T>, kSumThreads> block;
  delta_row(block, rows);
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    prototype_loss_columns_kernel(const T* columns, int64_t blocks, int64_t k, double* column_sum) {
  DeviceBlock<State<T>, kSumThreads> block;
  sum_columns(block, columns, blocks, k, column_sum);
}

template <typename T>
void forward(const PrototypeLossArgs& args, void* columns, int blocks, cudaStream_t stream) {
  const Rows<T> rows = rows_of<T>(args, args.column_sum ? columns : nullptr);
  const int threads = threads_for<T>(args.k);
  if constexpr (std::is_same_v<T, float>) {
    if (threads == 128) prototype_loss_registers_kernel<128><<<blocks, threads, 0, stream>>>(rows);
    if (threads == 256) prototype_loss_registers_kernel<256><<<blocks, threads, 0, stream>>>(rows);
    if (threads == 512) prototype_loss_registers_kernel<512><<<blocks, threads, 0, stream>>>(rows);
    if (threads == 1024) prototype_loss_registers_kernel<1024><<<blocks, threads, 0, stream>>>(rows);
  }
  if (threads == 0) prototype_loss_passes_kernel<T><<<blocks, kPassThreads, 0, stream>>>(rows);
  cuda_check(cudaGetLastError(), "prototype_loss");
  if (!args.column_sum) return;
  const unsigned groups = unsigned((args.k + kColumns - 1) / kColumns);
  prototype_loss_columns_kernel<T><<<groups, kSumThreads, 0, stream>>>(rows.columns, blocks, args.k, args.column_sum);
  cuda_check(cudaGetLastError(), "prototype_loss: column sums");
}

template <typename T>
void delta(const PrototypeLossArgs& args, cudaStream_t stream) {
  prototype_loss_delta_kernel<T><<<unsigned(args.rows), kSumThreads, 0, stream>>>(rows_of<T>(args, nullptr));
  cuda_check(cudaGetLastError(), "prototype_loss: delta");
}

}  // namespace

void prototype_loss_forward_cuda(const PrototypeLossArgs& args, void* columns, int blocks, int device, void* stream) {
  if (args.rows == 0) return;
  const DeviceGuard guard(device);
  if (args.dtype == DType::float64)
    forward<double>(args, columns, blocks, static_cast<cudaStream_t>(stream));
  else
    forward<float>(args, columns, blocks, static_cast<cudaStream_t>(stream));
}

void prototype_loss_delta_cuda(const PrototypeLossArgs& args, int device, void* stream) {
  if (args.rows == 0) return;
  const DeviceGuard guard(device);
  if (args.dtype == DType::float64)
    delta<double>(args, static_cast<cudaStream_t>(stream));
  else
    delta<float>(args, static_cast<cudaStream_t>(stream));
}

}  // namespace matpac
