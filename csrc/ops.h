// The whole native surface: plain functions on raw pointers. No torch, no Python.
//
// The Python side validates every argument (matpac_fast/ops), allocates every output and passes the current stream;
// the functions here trust what they get. Sizes and strides are in elements.
#pragma once

#include <cstdint>

namespace matpac {

// CUDA versions as 1000 * major + 10 * minor: what the driver supports (0 without a driver) and what the static
// runtime in this binary is. Both 0 in a build without CUDA.
int cuda_driver_version();
int cuda_runtime_version();

}  // namespace matpac
