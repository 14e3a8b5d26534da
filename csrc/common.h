// What every op needs: the dtype switch, the error check and the device guard on the GPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "ops.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MATPAC_HD __host__ __device__ __forceinline__
#else
#define MATPAC_HD inline __attribute__((always_inline))
#endif

namespace matpac {

// Calls fn(T{}) with the C++ type of `dtype`, which must be among Ts: dispatch<float, int16_t>(dtype, fn).
template <typename T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct dtype_of<int16_t> {
  static constexpr DType value = DType::int16;
};

template <typename... Ts, typename Fn>
void dispatch(DType dtype, const char* what, Fn&& fn) {
  const bool found = ((dtype_of<Ts>::value == dtype && (fn(Ts{}), true)) || ...);
  if (!found) throw std::invalid_argument(std::string(what) + ": no kernel for dtype " + std::to_string(int(dtype)));
}

#ifdef __CUDACC__
inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) cuda_check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};
#endif

}  // namespace matpac
