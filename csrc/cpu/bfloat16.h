// bfloat16 as a type to store: it is read as float32, which it is the upper half of, and rounded to when written.
#pragma once

#include "../common.h"
#include "simd.h"

namespace matpac::MATPAC_ISA {

struct BFloat16 {
  uint16_t bits;
};

// What is stored as S is computed in.
template <typename S>
struct ComputedIn {
  using type = S;
};
template <>
struct ComputedIn<BFloat16> {
  using type = float;
};
template <typename S>
using Computed = typename ComputedIn<S>::type;

MATPAC_INLINE float widen(float x) { return x; }
MATPAC_INLINE double widen(double x) { return x; }
MATPAC_INLINE float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// A vector of what is stored, as what it is computed in.
MATPAC_INLINE Vector<float> load_wide(const float* from) { return load(from); }
MATPAC_INLINE Vector<double> load_wide(const double* from) { return load(from); }
MATPAC_INLINE Vector<float> load_wide(const BFloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Whole __attribute__((vector_size(kVectorBytes)));
  Half half;
  std::memcpy(&half, from, sizeof(half));
  return (Vector<float>)(__builtin_convertvector(half, Whole) << 16);
}

MATPAC_INLINE void narrow(float x, float& out) { out = x; }
MATPAC_INLINE void narrow(double x, double& out) { out = x; }
MATPAC_INLINE void narrow(float x, BFloat16& out) { out.bits = bfloat16_bits(x); }

// Four rows of x, `row` apart, become four columns of `out`, whose rows are `out_row` apart. How many of `width` it
// did.
template <typename S>
MATPAC_INLINE int64_t turn_four(const S* x, int64_t row, int64_t width, float* out, int64_t out_row) {
  constexpr int lanes = kLanes<float>;
  int64_t k = 0;
  for (; k + lanes <= width; k += lanes) {
    Vector<float> rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = load_wide(x + r * row + k);
    turn(rows);
    for (int r = 0; r < 4; ++r) {
      float lane[lanes];
      store(lane, rows[r]);
      for (int q = 0; q < lanes / 4; ++q) std::memcpy(out + (k + 4 * q + r) * out_row, lane + 4 * q, 4 * sizeof(float));
    }
  }
  return k;
}
MATPAC_INLINE int64_t turn_four(const double*, int64_t, int64_t, double*, int64_t) { return 0; }

}  // namespace matpac::MATPAC_ISA
