// pybind11 and nothing else: integers in, pointers out, the GIL released in CPU functions.
#include <pybind11/pybind11.h>

#include <utility>

#include "ops.h"

namespace py = pybind11;

#ifndef MATPAC_FAST_WITH_CUDA
int matpac::cuda_driver_version() { return 0; }
int matpac::cuda_runtime_version() { return 0; }
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "matpac_fast's native functions on raw pointers; see csrc/ops.h";
#ifdef MATPAC_FAST_WITH_CUDA
  m.attr("CUDA_ARCHS") = MATPAC_FAST_CUDA_ARCHS;
#else
  m.attr("CUDA_ARCHS") = "";
#endif
  m.def("cuda_versions", [] { return std::make_pair(matpac::cuda_driver_version(), matpac::cuda_runtime_version()); },
        "(driver, runtime) as 1000 * major + 10 * minor, 0 where there is none");
}
