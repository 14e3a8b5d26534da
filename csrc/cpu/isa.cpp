// Which instruction set runs; compiled once, for the portable pass.
#include "isa.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "../ops.h"

namespace matpac {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa best() {
#if defined(MATPAC_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
#if defined(MATPAC_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
#endif
    return Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<int>& current() {
  static std::atomic<int> value{int(best())};
  return value;
}

}  // namespace

Isa isa() { return Isa(current().load(std::memory_order_relaxed)); }

std::string cpu_isa() { return kNames[int(isa())]; }

bool cpu_is_amd() {
#if defined(MATPAC_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

void set_cpu_isa(const std::string& name) {
  for (int i = 0; i <= int(best()); ++i) {
    if (name == kNames[i]) {
      current().store(i);
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; the best is " + kNames[int(best())]);
}

}  // namespace matpac
