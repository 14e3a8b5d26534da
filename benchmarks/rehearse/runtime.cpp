// A CUDA runtime and driver on which nothing is computed: what torch, Triton and NCCL call of them, for a GPU that is
// not there. Memory is the host's and as large as a GPU's, since pages that nothing touches take none; copies are
// copies; a launch is checked against the GPU's limits and counted, and then forgotten. A graph replays as nothing.
//
// Results are whatever the memory held. Of a collective every rank gets its own part back.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#undef cudaGetDeviceProperties
#undef cudaEventRecord

namespace {

constexpr size_t MEMORY = size_t(80) << 30;
constexpr int MULTIPROCESSORS = 132, SHARED = 232448, REGISTERS = 65536, WARP = 32;

int devices() {
  static const int count = std::getenv("REHEARSE_GPUS") ? std::atoi(std::getenv("REHEARSE_GPUS")) : 1;
  return count;
}

struct Block {
  size_t size;
  cudaMemoryType type;
  bool mapped;
};
std::mutex mutex;
std::map<uintptr_t, Block> blocks;
size_t used = 0;  // of all devices together: each would have its own
thread_local int current = 0;
thread_local bool capturing = false;
std::atomic<uintptr_t> handles{16};
std::atomic<long> launches{0};

cudaError_t take(void** pointer, size_t size, cudaMemoryType type) {
  std::lock_guard<std::mutex> lock(mutex);
  size_t whole = (size / 4096 + 1) * 4096;
  if (type == cudaMemoryTypeDevice && used + whole > MEMORY * devices()) return cudaErrorMemoryAllocation;
  void* found = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return cudaErrorMemoryAllocation;
  blocks[reinterpret_cast<uintptr_t>(found)] = {whole, type, true};
  if (type == cudaMemoryTypeDevice) used += whole;
  *pointer = found;
  return cudaSuccess;
}

cudaError_t give(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == blocks.end()) return cudaSuccess;
  if (found->second.type == cudaMemoryTypeDevice) used -= found->second.size;
  if (found->second.mapped) munmap(pointer, found->second.size);
  blocks.erase(found);
  return cudaSuccess;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared) {
  launches++;
  size_t threads = size_t(block.x) * block.y * block.z;
  bool fits = grid.x && grid.y && grid.z && grid.y < 65536 && grid.z < 65536 && threads && threads <= 1024;
  if (fits && shared <= SHARED) return cudaSuccess;
  std::fprintf(stderr, "rehearse: no GPU launches a grid of %u x %u x %u, blocks of %zu threads, %zu bytes shared\n",
               grid.x, grid.y, grid.z, threads, shared);
  return cudaErrorInvalidConfiguration;
}

cudaError_t refused(const char* what) {
  std::fprintf(stderr, "rehearse: %s while a graph is captured\n", what);
  return cudaErrorStreamCaptureUnsupported;
}

using Clock = std::chrono::steady_clock;

}  // namespace

extern "C" {

long rehearse_launches() { return launches; }

// devices

cudaError_t cudaGetDeviceCount(int* count) { return *count = devices(), cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
  return current = device, cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "rehearsal of an H100");
  p->major = 9;
  p->totalGlobalMem = MEMORY;
  p->multiProcessorCount = MULTIPROCESSORS;
  p->warpSize = WARP;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = SHARED;
  p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = p->concurrentKernels = p->managedMemory = 1;
  p->asyncEngineCount = 3;
  p->textureAlignment = 512;
  p->pciBusID = 1 + device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMultiProcessorCount, MULTIPROCESSORS},
      {cudaDevAttrWarpSize, WARP},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, SHARED},
      {cudaDevAttrMaxRegistersPerBlock, REGISTERS},
      {cudaDevAttrMaxRegistersPerMultiprocessor, REGISTERS},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMemoryClockRate, 2600000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
  };
  auto found = known.find(attribute);
  return *value = found == known.end() ? 1 : found->second, cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
  return std::snprintf(id, size, "0000:%02x:00.0", 1 + device), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return capturing ? refused("the device is waited for") : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *found = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaError" : "cudaSuccess"; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "an error of the rehearsal" : "no error";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// memory

cudaError_t cudaMalloc(void** pointer, size_t size) { return take(pointer, size, cudaMemoryTypeDevice); }
cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) { return cudaMalloc(pointer, size); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) { return take(pointer, size, cudaMemoryTypeHost); }
cudaError_t cudaFree(void* pointer) { return give(pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return give(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return give(pointer); }
cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  blocks[reinterpret_cast<uintptr_t>(pointer)] = {size, cudaMemoryTypeHost, false};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) { return give(pointer); }
cudaError_t cudaMemGetInfo(size_t* room, size_t* total) {
  return *room = MEMORY * devices() - used, *total = MEMORY, cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  std::memset(found, 0, sizeof *found);
  std::lock_guard<std::mutex> lock(mutex);
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto block = blocks.upper_bound(address);
  if (block == blocks.begin() || address >= (--block)->first + block->second.size) {
    found->type = cudaMemoryTypeUnregistered;
    return cudaSuccess;
  }
  found->type = block->second.type;
  found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
  if (capturing && kind == cudaMemcpyDeviceToHost) return refused("numbers are read");
  if (!capturing) std::memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, size, kind, nullptr);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t) {
  return std::memmove(to, from, size), cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
cudaError_t cudaMemset(void* to, int value, size_t size) { return std::memset(to, value, size), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) { return cudaMemset(to, value, size); }
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbol[1 << 20];
  return *pointer = symbol, cudaSuccess;
}

// events, streams and graphs: all that was asked for is done at once

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Clock::time_point(Clock::now()));
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return delete reinterpret_cast<Clock::time_point*>(event), cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return *reinterpret_cast<Clock::time_point*>(event) = Clock::now(), cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t first, cudaEvent_t second) {
  auto passed = *reinterpret_cast<Clock::time_point*>(second) - *reinterpret_cast<Clock::time_point*>(first);
  return *ms = 1e-3f + std::chrono::duration<float, std::milli>(passed).count(), cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return capturing ? refused("an event is waited for") : cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = reinterpret_cast<cudaStream_t>(handles += 16), cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return capturing ? refused("a stream is waited for") : cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  return call(stream, cudaSuccess, data), cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) { return call(data), cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return capturing = true, cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  return capturing = false, *graph = reinterpret_cast<cudaGraph_t>(8), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData**,
                                     size_t* count) {
  if (id) *id = 1;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(8);
  if (nodes) *nodes = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
  return *graph = reinterpret_cast<cudaGraphExec_t>(8), cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return launches++, cudaSuccess; }
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// kernels

thread_local struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configured;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  return configured = {grid, block, shared, stream}, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared;
  return *static_cast<void**>(stream) = configured.stream, cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
  static void* binary[4];
  return binary;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void*) {
  return *kernel = reinterpret_cast<cudaKernel_t>(8), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch(grid, block, shared);
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch(grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  std::memset(found, 0, sizeof *found);
  return found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->binaryVersion = found->ptxVersion = 90,
         cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  return *count = 2, cudaSuccess;
}

}  // extern "C"
