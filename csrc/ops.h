// The whole native surface: plain functions on raw pointers. No torch, no Python.
//
// The Python side validates every argument (matpac_fast/ops), allocates every output and passes the current stream;
// the functions here trust what they get. Sizes and strides are in elements.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace matpac {

enum class DType : int { float32 = 0, float64 = 1, int16 = 2, bfloat16 = 3, float16 = 4 };

// The instruction set of the CPU kernels: portable, avx2, avx512 or avx512_bf16, chosen at load. Setting it is for
// tests and benchmarks: it throws for one that this CPU lacks.
std::string cpu_isa();
void set_cpu_isa(const std::string& name);
bool cpu_is_amd();

// CUDA versions as 1000 * major + 10 * minor: what the driver supports (0 without a driver) and what the static
// runtime in this binary is. Both 0 in a build without CUDA.
int cuda_driver_version();
int cuda_runtime_version();

// Normalised log-mel of windows of 400 samples: out[b, m, t] = (ln(mel + log_offset) - mean) / std.
struct LogMelArgs {
  const void* wave;  // (batch, *) float32, float64 or int16 (32768 counts as 1.0), clips `stride` apart
  DType wave_dtype;
  int64_t batch, stride;
  int64_t hop, frames;
  void* out;  // (batch, n_mels, frames) contiguous; float64 for a float64 wave, else float32 (on CUDA also bfloat16)
  DType out_dtype;
  const double* window;  // (400,)
  // (n_mels, 3): the first bin of a mel, how many, where its weights begin. For CUDA (n_mels, 2): how many fours of
  // bins, and which of all mels' is the first.
  const int32_t* bands;
  // All mels', one after the other; float64 for a float64 wave, else float32. For CUDA (fours, 8), aligned to 16 bytes:
  // four float32, and as int32 the places of these bins' powers, as log_mel_places has them.
  const void* weights;
  const void* inverse_sums;  // (n_mels,) 1 / the sum of a mel's weights, of the same type
  int n_mels;
  double log_offset, mean, std;
};
void log_mel_cpu(const LogMelArgs& args, int threads);
// On CUDA: not for float64; one float32 transform for every frame.
void log_mel_cuda(const LogMelArgs& args, int device, void* stream);
// Of each of the 201 bins.
std::vector<int> log_mel_places();
// The CUDA kernel run block by block on the host, its threads in one order or the other, for tests.
void log_mel_emulated(const LogMelArgs& args, int blocks, bool backwards);

// Random permutations: row i of `out` (batch, n_tokens) orders the tokens by keys that are a function of
// (base, index[i]), where base is splitmix64(splitmix64(seed) ^ step).
void mask_shuffle_cpu(int64_t base, const int64_t* index, int64_t batch, int64_t n_tokens, int64_t* out, int threads);

// The memory movement of masked_patch_embed for `count` patches of every sample: row 1 + j of a sample gets patch
// ids[j] in `patches` and row 1 + ids[j] of `table` in `tokens`. Row 0, the CLS token, gets zeros and the table's row
// 0, so that tokens + patches @ weight is the result without a gap between samples.
struct PatchGatherArgs {
  const void* spec;  // (batch, F, T) of `itemsize` bytes an element, frames next to each other
  int itemsize;
  int64_t batch, batch_stride, freq_stride;
  int64_t grid_freq, grid_time, patch;
  const int64_t* ids;  // (batch, *), rows `ids_stride` apart
  int64_t ids_stride, count;
  void* patches;      // (batch, 1 + count, patch * patch) contiguous
  const void* table;  // (1 + grid_freq * grid_time, width) contiguous, `itemsize` bytes an element
  int64_t width;
  void* tokens;  // (batch, 1 + count, width) contiguous, or null: patches only
};
// False where an id names no patch; what it then wrote is undefined.
bool patch_gather_cpu(const PatchGatherArgs& args, int threads);

// prototype_loss once the matrix products are done, for some rows of logits. q = softmax(student / student_temp) and
// p = softmax((teacher - center) / teacher_temp).
//   forward: loss = -sum(p log q) and the statistics, `delta` = q - p where it is not null, and p is added to
//            `column_sum` where that is not null
//   delta:   `delta` = q - p from the statistics
struct PrototypeLossArgs {
  const void* student;  // (rows, k) contiguous logits of `dtype`, as is all the rest but `column_sum` and `delta`
  const void* teacher;  // (rows, k)
  const void* center;   // (k,)
  DType dtype;          // float32 or float64
  int64_t rows, k;
  const double* scales;  // (2,) log2(e) / temperature of student and teacher; in memory, so that no step waits for it
  void* loss;            // (rows,)
  void* stats;           // (rows, 4): maximum of the student's logits, 1 / sum of exponentials, the teacher's two
  void* delta;           // (rows, k) of `delta_dtype`; may be `student` itself where the dtype is the same
  DType delta_dtype;     // `dtype`; CUDA: also bfloat16 or float16
  double* column_sum;    // (k,)
};
void prototype_loss_forward_cpu(const PrototypeLossArgs& args, int threads);
void prototype_loss_delta_cpu(const PrototypeLossArgs& args, int threads);
// `columns` (blocks, k) of `dtype` is scratch memory; the bits of `column_sum` depend on `blocks`.
void prototype_loss_forward_cuda(const PrototypeLossArgs& args, void* columns, int blocks, int device, void* stream);
void prototype_loss_delta_cuda(const PrototypeLossArgs& args, int device, void* stream);
// The CUDA kernels run block by block on the host, for tests.
void prototype_loss_forward_emulated(const PrototypeLossArgs& args, void* columns, int blocks);
void prototype_loss_delta_emulated(const PrototypeLossArgs& args);

// prediction_loss before its heads are weighed, for predictions p and their targets t, u and v being their lengths and
// none of them less than `eps`.
//   forward:  loss = 2 - 2 cos, cos = p t / (u v), and the statistics
//   backward: out = grad * d loss / d p from the statistics
struct PredictionLossArgs {
  const void* prediction;  // (rows, heads, width) contiguous, of `dtype`, as is all the rest
  const void* target;      // (rows, width)
  DType dtype;             // float32 or float64
  int64_t rows, heads, width;
  double eps;
  void* loss;        // (rows, heads)
  void* stats;       // (rows, heads, 3): u, v, cos
  const void* grad;  // (rows, heads)
  void* out;         // (rows, heads, width)
};
void prediction_loss_cpu(const PredictionLossArgs& args, bool backward, int threads);

// attention: softmax(q k / sqrt(width)) v of every head.
//   forward:  out = the result, and the statistics where `stats` is not null
//   backward: out = the gradient of qkv, from the result, its gradient and the statistics
struct AttentionArgs {
  const void* qkv;  // (batch, tokens, 3, heads, width) contiguous, of `dtype`, as is all the rest
  DType dtype;      // float32, float64, or bfloat16, which is summed in float32, as are the statistics
  int64_t batch, tokens, heads, width;
  void* out;           // (batch, tokens, heads, width); backward: as qkv
  void* stats;         // (batch, heads, tokens, 2): the largest q k of a query, and 1 / its sum of exponentials
  const void* result;  // (batch, tokens, heads, width)
  const void* grad;    // (batch, tokens, heads, width)
};
void attention_cpu(const AttentionArgs& args, bool backward, int threads);

// A matrix's transpose and the sums of its columns.
struct TransposedArgs {
  const float* x;  // (rows, width) contiguous
  int64_t rows, width;
  float* out;   // (width, rows)
  float* sums;  // (width,)
};
void transposed_cpu(const TransposedArgs& args, int threads);

}  // namespace matpac
