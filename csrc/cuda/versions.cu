// Which CUDA this binary carries and which the driver supports.
#include <cuda_runtime.h>

#include "../ops.h"

int matpac::cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int matpac::cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
