// What ops share: rounding to bfloat16, and on the GPU the error check and the device guard.
#pragma once

#include <cstdint>
#include <cstring>
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

// The bits of bfloat16: to the nearest, of two as near to the even one, as torch rounds; NaN stays NaN.
MATPAC_HD uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t(x == x ? nearest : 0x7fc0);
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
