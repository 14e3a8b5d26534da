// pybind11 and nothing else: integers in, pointers out, the GIL released in CPU functions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "ops.h"

namespace py = pybind11;

namespace {

// A pointer as Python has it, from tensor.data_ptr().
using Address = std::uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Positional arguments in the order of LogMelArgs.
matpac::LogMelArgs log_mel_args(Address wave, int wave_dtype, int64_t batch, int64_t stride, int64_t hop,
                                int64_t frames, Address out, int out_dtype, Address window, Address bands,
                                Address weights, Address inverse_sums, int n_mels, double log_offset, double mean,
                                double std) {
  return {pointer(wave),
          matpac::DType(wave_dtype),
          batch,
          stride,
          hop,
          frames,
          pointer(out),
          matpac::DType(out_dtype),
          pointer<double>(window),
          pointer<std::int32_t>(bands),
          pointer(weights),
          pointer(inverse_sums),
          n_mels,
          log_offset,
          mean,
          std};
}

// Positional arguments in the order of PatchGatherArgs.
matpac::PatchGatherArgs patch_gather_args(Address spec, int itemsize, int64_t batch, int64_t batch_stride,
                                          int64_t freq_stride, int64_t grid_freq, int64_t grid_time, int64_t patch,
                                          Address ids, int64_t ids_stride, int64_t count, Address patches,
                                          Address table, int64_t width, Address tokens) {
  return {pointer(spec),  itemsize,    batch,
          batch_stride,   freq_stride, grid_freq,
          grid_time,      patch,       pointer<std::int64_t>(ids),
          ids_stride,     count,       pointer(patches),
          pointer(table), width,       pointer(tokens)};
}

// Positional arguments in the order of PrototypeLossArgs.
matpac::PrototypeLossArgs prototype_loss_args(Address student, Address teacher, Address center, int dtype, int64_t rows,
                                              int64_t k, Address scales, Address loss, Address stats, Address delta,
                                              int delta_dtype, Address column_sum) {
  return {pointer(student),
          pointer(teacher),
          pointer(center),
          matpac::DType(dtype),
          rows,
          k,
          pointer<double>(scales),
          pointer(loss),
          pointer(stats),
          pointer(delta),
          matpac::DType(delta_dtype),
          pointer<double>(column_sum)};
}

// Positional arguments in the order of PredictionLossArgs.
matpac::PredictionLossArgs prediction_loss_args(Address prediction, Address target, int dtype, int64_t rows,
                                                int64_t heads, int64_t width, double eps, Address loss, Address stats,
                                                Address grad, Address out) {
  return {pointer(prediction), pointer(target), matpac::DType(dtype), rows,        heads, width, eps,
          pointer(loss),       pointer(stats),  pointer(grad),        pointer(out)};
}

// Positional arguments in the order of AttentionArgs.
matpac::AttentionArgs attention_args(Address qkv, int dtype, int64_t batch, int64_t tokens, int64_t heads,
                                     int64_t width, Address out, Address stats, Address result, Address grad) {
  return {pointer(qkv), matpac::DType(dtype), batch,          tokens,          heads,
          width,        pointer(out),         pointer(stats), pointer(result), pointer(grad)};
}

// Positional arguments in the order of TransposedArgs.
matpac::TransposedArgs transposed_args(Address x, int64_t rows, int64_t width, Address out, Address sums) {
  return {pointer<float>(x), rows, width, pointer<float>(out), pointer<float>(sums)};
}

}  // namespace

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
  m.def(
      "cuda_versions", [] { return std::make_pair(matpac::cuda_driver_version(), matpac::cuda_runtime_version()); },
      "(driver, runtime) as 1000 * major + 10 * minor, 0 where there is none");
  m.def("cpu_isa", &matpac::cpu_isa, "The instruction set of the CPU kernels: portable, avx2, avx512 or avx512_bf16.");
  m.def("cpu_is_amd", &matpac::cpu_is_amd, "Whether AMD made this CPU.");
  m.def("set_cpu_isa", &matpac::set_cpu_isa, py::arg("name"), "Use a lower instruction set; for tests and benchmarks.");

  py::class_<matpac::LogMelArgs>(m, "LogMelArgs").def(py::init(&log_mel_args));
  m.def("log_mel_cpu", &matpac::log_mel_cpu, py::arg("args"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("log_mel_places", &matpac::log_mel_places);
  m.def("log_mel_emulated", &matpac::log_mel_emulated, py::arg("args"), py::arg("blocks"), py::arg("backwards"));
#ifdef MATPAC_FAST_WITH_CUDA
  m.def("log_mel_cuda", [](const matpac::LogMelArgs& args, int device, Address stream) {
    matpac::log_mel_cuda(args, device, pointer(stream));
  });
#endif

  m.def(
      "mask_shuffle_cpu",
      [](int64_t base, Address index, int64_t batch, int64_t n_tokens, Address out, int threads) {
        matpac::mask_shuffle_cpu(base, pointer<std::int64_t>(index), batch, n_tokens, pointer<std::int64_t>(out),
                                 threads);
      },
      py::call_guard<py::gil_scoped_release>());

  py::class_<matpac::PatchGatherArgs>(m, "PatchGatherArgs").def(py::init(&patch_gather_args));
  m.def("patch_gather_cpu", &matpac::patch_gather_cpu, py::arg("args"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());

  py::class_<matpac::PrototypeLossArgs>(m, "PrototypeLossArgs").def(py::init(&prototype_loss_args));
  m.def("prototype_loss_forward_cpu", &matpac::prototype_loss_forward_cpu, py::arg("args"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("prototype_loss_delta_cpu", &matpac::prototype_loss_delta_cpu, py::arg("args"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("prototype_loss_forward_emulated", [](const matpac::PrototypeLossArgs& args, Address columns, int blocks) {
    matpac::prototype_loss_forward_emulated(args, pointer(columns), blocks);
  });
  m.def("prototype_loss_delta_emulated", &matpac::prototype_loss_delta_emulated);
#ifdef MATPAC_FAST_WITH_CUDA
  m.def("prototype_loss_forward_cuda",
        [](const matpac::PrototypeLossArgs& args, Address columns, int blocks, int device, Address stream) {
          matpac::prototype_loss_forward_cuda(args, pointer(columns), blocks, device, pointer(stream));
        });
  m.def("prototype_loss_delta_cuda", [](const matpac::PrototypeLossArgs& args, int device, Address stream) {
    matpac::prototype_loss_delta_cuda(args, device, pointer(stream));
  });
#endif

  py::class_<matpac::PredictionLossArgs>(m, "PredictionLossArgs").def(py::init(&prediction_loss_args));
  m.def("prediction_loss_cpu", &matpac::prediction_loss_cpu, py::arg("args"), py::arg("backward"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());

  py::class_<matpac::AttentionArgs>(m, "AttentionArgs").def(py::init(&attention_args));
  m.def("attention_cpu", &matpac::attention_cpu, py::arg("args"), py::arg("backward"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());

  py::class_<matpac::TransposedArgs>(m, "TransposedArgs").def(py::init(&transposed_args));
  m.def("transposed_cpu", &matpac::transposed_cpu, py::arg("args"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
