// CUDA's runtime as far as csrc/cuda calls it: there is one GPU, and a launch goes to whoever has asked for launches.
// And csrc/cuda's functions in C, with positional arguments in the order of their structures.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

#include "ops.h"

namespace {

using OnLaunch = void (*)(const char* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared,
                          void** args);
OnLaunch on_launch = nullptr;
int processors = 0;
std::map<const void*, std::string> kernels;
std::string error;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

template <typename Fn>
const char* told(const Fn& fn) {
  try {
    fn();
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

extern "C" {

void set_launches(OnLaunch function, int count) { on_launch = function, processors = count; }

const char* log_mel(uintptr_t wave, int wave_dtype, int64_t batch, int64_t stride, int64_t hop, int64_t frames,
                    uintptr_t out, int out_dtype, uintptr_t window, uintptr_t bands, uintptr_t weights,
                    uintptr_t inverse_sums, int n_mels, double log_offset, double mean, double std) {
  const matpac::LogMelArgs args{pointer(wave),
                                matpac::DType(wave_dtype),
                                batch,
                                stride,
                                hop,
                                frames,
                                pointer(out),
                                matpac::DType(out_dtype),
                                pointer<double>(window),
                                pointer<int32_t>(bands),
                                pointer(weights),
                                pointer(inverse_sums),
                                n_mels,
                                log_offset,
                                mean,
                                std};
  return told([&] { matpac::log_mel_cuda(args, 0, nullptr); });
}

#define PROTOTYPE_ARGS                                                                                          \
  uintptr_t student, uintptr_t teacher, uintptr_t center, int dtype, int64_t rows, int64_t k, uintptr_t scales, \
      uintptr_t loss, uintptr_t stats, uintptr_t delta, int delta_dtype, uintptr_t column_sum
#define PROTOTYPE              \
  {pointer(student),           \
   pointer(teacher),           \
   pointer(center),            \
   matpac::DType(dtype),       \
   rows,                       \
   k,                          \
   pointer<double>(scales),    \
   pointer(loss),              \
   pointer(stats),             \
   pointer(delta),             \
   matpac::DType(delta_dtype), \
   pointer<double>(column_sum)}

const char* prototype_loss_forward(PROTOTYPE_ARGS, uintptr_t columns, int blocks) {
  const matpac::PrototypeLossArgs args PROTOTYPE;
  return told([&] { matpac::prototype_loss_forward_cuda(args, pointer(columns), blocks, 0, nullptr); });
}
const char* prototype_loss_delta(PROTOTYPE_ARGS) {
  const matpac::PrototypeLossArgs args PROTOTYPE;
  return told([&] { matpac::prototype_loss_delta_cuda(args, 0, nullptr); });
}

// What nvcc's code calls.

void** __cudaRegisterFatBinary(void*) { return pointer<void*>(16); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  return *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host)), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  on_launch(kernels.at(kernel).c_str(), grid.x, grid.y, grid.z, block.x * block.y * block.z, shared, args);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  return *value = processors, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an attribute that benchmarks/ptx does not know"; }

}  // extern "C"
