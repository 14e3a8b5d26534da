// The driver, for Triton's launches, and of cuBLAS, cuSOLVER and NCCL what must hand something back. run.py adds the
// rest of those libraries: functions that do nothing and succeed.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

namespace {

CUresult launched(cudaError_t error) { return error == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

void* const SOME = reinterpret_cast<void*>(8);  // a handle

const int SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // bytes, by NCCL's numbers of dtypes
int world = 1;

int own(const void* from, void* to, size_t count, int dtype) { return std::memmove(to, from, count * SIZES[dtype]), 0; }

int joined(void** comm, int ranks) { return *comm = SOME, world = ranks, 0; }

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return launched(cudaGetDeviceCount(count)); }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return launched(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device));
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = static_cast<CUcontext>(SOME), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "an error of the rehearsal", CUDA_SUCCESS; }
CUresult cuModuleLoad(CUmodule* module, const char*) { return *module = static_cast<CUmodule>(SOME), CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void*) { return cuModuleLoad(module, nullptr); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  return *function = static_cast<CUfunction>(SOME), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute, CUdeviceptr pointer) {
  cudaPointerAttributes found;
  cudaPointerGetAttributes(&found, reinterpret_cast<void*>(pointer));
  if (found.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  return *static_cast<CUdeviceptr*>(data) = pointer, CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction, void**, void**) {
  dim3 grid(c->gridDimX, c->gridDimY, c->gridDimZ), block(c->blockDimX, c->blockDimY, c->blockDimZ);
  return launched(cudaLaunchKernel(nullptr, grid, block, nullptr, c->sharedMemBytes, nullptr));
}
CUresult cuLaunchKernel(CUfunction, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream, void**, void**) {
  return launched(cudaLaunchKernel(nullptr, dim3(gx, gy, gz), dim3(bx, by, bz), nullptr, shared, nullptr));
}

int cublasCreate_v2(void** handle) { return *handle = SOME, 0; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
size_t cublasLtGetVersion() { return 130000; }
int cublasLtMatmulDescCreate(void** made, int, int) { return *made = SOME, 0; }
int cublasLtMatrixLayoutCreate(void** made, int, unsigned long, unsigned long, long) { return *made = SOME, 0; }
int cublasLtMatmulPreferenceCreate(void** made) { return *made = SOME, 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* count) {
  return *count = 1, 0;
}
int cusolverDnCreate(void** handle) { return *handle = SOME, 0; }
int cusolverDnXsyevd_bufferSize(void*, void*, int, int, long, int, const void*, long, int, const void*, int,
                                size_t* device, size_t* host) {
  return *device = *host = 0, 0;
}

int ncclGetVersion(int* version) { return *version = 22800, 0; }
const char* ncclGetErrorString(int) { return "an error of the rehearsal"; }
const char* ncclGetLastError(void*) { return ""; }
int ncclCommGetAsyncError(void*, int* error) { return *error = 0; }
int ncclCommInitRank(void** comm, int ranks, ...) { return joined(comm, ranks); }
int ncclCommInitRankConfig(void** comm, int ranks, ...) { return joined(comm, ranks); }
int ncclCommInitRankScalable(void** comm, int ranks, ...) { return joined(comm, ranks); }
int ncclCommSplit(void*, int, int, void** comm, void*) { return joined(comm, world); }
int ncclAllReduce(const void* from, void* to, size_t n, int dtype, int, void*, void*) {
  return own(from, to, n, dtype);
}
int ncclBroadcast(const void* from, void* to, size_t n, int dtype, int, void*, void*) {
  return own(from, to, n, dtype);
}
int ncclReduce(const void* from, void* to, size_t n, int dtype, int, int, void*, void*) {
  return own(from, to, n, dtype);
}
int ncclReduceScatter(const void* from, void* to, size_t n, int dtype, int, void*, void*) {
  return own(from, to, n, dtype);
}
int ncclAllGather(const void* from, void* to, size_t n, int dtype, void*, void*) {
  for (int rank = 0; rank < world; rank++) own(from, static_cast<char*>(to) + rank * n * SIZES[dtype], n, dtype);
  return 0;
}

}  // extern "C"
