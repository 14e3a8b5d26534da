// The end of log_mel, for the CPU and for CUDA: the logarithm and the normalisation, in the arithmetic N of fft400.h.
#pragma once

#include <math.h>

#include "fft400.h"

namespace matpac {

// (ln x - mean) / std in float32, rounded once.
//
// With x = m 2^e, m in [sqrt(1/2), sqrt(2)), it is (e ln 2 - mean) / std + ln(m) / std. The first, large part is
// computed exactly, because its slope and bias are cut to a common grid; their rests go to the second, small part.
struct LogNormaliser {
  static constexpr int kDegree = 9;
  float slope, slope_rest, bias, bias_rest;
  float poly[kDegree];

  LogNormaliser(double mean, double std) {
    const double exact_slope = M_LN2 / std, exact_bias = -mean / std;
    const double grid = ldexp(1.0, ilogb(fmax(fabs(exact_slope) * 128, fabs(exact_bias))) - 22);
    slope = float(rint(exact_slope / grid) * grid);
    bias = float(rint(exact_bias / grid) * grid);
    slope_rest = float(exact_slope - double(slope));
    bias_rest = float(exact_bias - double(bias));
    // ln(1 + f) = f + f^2 (...) to 7e-9 on [sqrt(1/2) - 1, sqrt(2) - 1]: least maximal error, by Lawson's iteration.
    const double coefficients[kDegree] = {1.0,           -0.49999982118, 0.33334225416,  -0.25002491474, 0.19953612983,
                                          -0.1655233502, 0.14979286492,  -0.14441870153, 0.08733621240};
    for (int i = 0; i < kDegree; ++i) poly[i] = float(coefficients[i] / std);
  }

  // x must be a normal number.
  template <typename N, typename V = typename N::Value>
  MATPAC_HD V of(V x) const {
    V e, m;
    N::split(x, e, m);
    const V f = m - N::set(1.0f);
    V p = N::set(poly[kDegree - 1]);
    MATPAC_UNROLL
    for (int i = kDegree - 2; i >= 0; --i) p = N::fma(p, f, N::set(poly[i]));
    return sum<N>(e, N::fma(p, f, rest<N>(e)));
  }

  // The same where the machine has the logarithm of m: N::log2 is off by 2^-22 at most.
  template <typename N, typename V = typename N::Value>
  MATPAC_HD V by_log2(V x) const {
    V e, m;
    N::split(x, e, m);
    return sum<N>(e, N::fma(N::log2(m), N::set(slope), rest<N>(e)));
  }

 private:
  template <typename N, typename V>
  MATPAC_HD V rest(V e) const {
    return N::fma(e, N::set(slope_rest), N::set(bias_rest));
  }
  template <typename N, typename V>
  MATPAC_HD V sum(V e, V small) const {
    return N::fma(e, N::set(slope), N::set(bias)) + small;
  }
};

}  // namespace matpac
