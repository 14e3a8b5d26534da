// The 400-point real FFT, one plan for the CPU and for CUDA: power spectra of many frames at once, one frame a lane.
//
// N is the arithmetic: N::Value is a number of every lane, a SIMD vector on the CPU (lanes = 4, 8 or 16 frames) and a
// float on the GPU (lanes = the threads of a warp); N::Scalar is a constant's type; N::fma(a, b, c) is a * b + c and
// N::fnma(a, b, c) is c - a * b, N::fms(a, b, c) is a * b - c, rounded once where the machine can. They are spelt out
// rather than left to the compiler, so that every compiler does the same operations.
//
// 400 = 25 * 16 and the factors share no divisor, so the prime factor algorithm (Good and Thomas) needs no twiddles
// between them. With n = (16 a + 25 b) mod 400, bin k is the (k mod 25, k mod 16) entry of a 25 x 16 transform:
//
//   rows:    for each b of 16, a 25-point DFT of the real x[n(a, b)] over a. Conjugate symmetry leaves 13 of its
//            outputs: one real, twelve complex.
//   columns: for each of those 13, a 16-point DFT over b, whose squared magnitudes are the powers of 16 bins (9 where
//            the column is real). Bins above 200 are the conjugates of others: each bin comes exactly once.
//
// All rows do the same arithmetic and all complex columns do: only the addresses differ, so they are loops (CPU) or
// the tasks of warps (CUDA).
#pragma once

#include "common.h"

#ifdef __CUDACC__
#define MATPAC_UNROLL _Pragma("unroll")
#define MATPAC_NO_UNROLL _Pragma("unroll 1")
#else
#define MATPAC_NO_UNROLL
#ifdef __clang__
#define MATPAC_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MATPAC_UNROLL _Pragma("GCC unroll 32")
#endif
#endif

namespace matpac::fft400 {

constexpr int kSize = 400;
constexpr int kBins = 201;
constexpr int kRows = 16;     // DFTs of 25 points
constexpr int kColumns = 13;  // DFTs of 16 points; the first is of real numbers
constexpr int kRowPoints = 25;
constexpr int kColumnPoints = 16;

// Sample a of row b.
constexpr MATPAC_HD int sample_of(int b, int a) { return (16 * a + 25 * b) % kSize; }

// A row's outputs, column by column: 0, 5, 10, 1, 6, 11, 16, 21, 2, 7, 12, 17, 22 (16, 21, 17 and 22 stand for their
// conjugates 9, 4, 8 and 3).
constexpr MATPAC_HD int residue_of(int column) {
  return column < 3 ? 5 * column : column < 8 ? 5 * column - 14 : 5 * column - 38;
}

// The bin whose power a column's 16-point DFT has at j, by the Chinese remainder theorem.
constexpr MATPAC_HD int bin_of(int column, int j) {
  const int k = (176 * residue_of(column) + 225 * j) % kSize;
  return k > kSize / 2 ? kSize - k : k;
}

// A constant in every lane.
template <typename N>
MATPAC_HD typename N::Value constant(double value) {
  return N::set(typename N::Scalar(value));
}

// 5-point DFTs. The cosines are -1/4 +- sqrt(5)/4; the ratio of the sines is golden, and their common factor kSine5 is
// left out until it can join a product that is due anyway.
constexpr double kRoot5 = 0.55901699437494742410;   // sqrt(5) / 4
constexpr double kGolden = 1.61803398874989484820;  // sin(2 pi / 5) / sin(4 pi / 5)
constexpr double kSine5 = 0.58778525229247312917;   // sin(4 pi / 5)

// Of real numbers: y0 and re1, re2; i1 and i2 are the imaginary parts of outputs 1 and 2 divided by -kSine5. Outputs 3
// and 4 are conjugates.
template <typename N, typename V = typename N::Value>
MATPAC_HD void dft5_real(V x0, V x1, V x2, V x3, V x4, V& y0, V& re1, V& i1, V& re2, V& i2) {
  const V p14 = x1 + x4, p23 = x2 + x3, m14 = x1 - x4, m23 = x2 - x3;
  const V sum = p14 + p23, difference = p14 - p23;
  y0 = x0 + sum;
  const V middle = N::fnma(constant<N>(0.25), sum, x0);
  re1 = N::fma(constant<N>(kRoot5), difference, middle);
  re2 = N::fnma(constant<N>(kRoot5), difference, middle);
  i1 = N::fma(constant<N>(kGolden), m14, m23);
  i2 = N::fnma(constant<N>(kGolden), m23, m14);
}

// Of complex numbers, in place.
template <typename N, typename V = typename N::Value>
MATPAC_HD void dft5(V (&re)[5], V (&im)[5]) {
  const V s = constant<N>(kSine5);
  V r0, r1, ri1, r2, ri2, i0, i1, ii1, i2, ii2;
  dft5_real<N>(re[0], re[1], re[2], re[3], re[4], r0, r1, ri1, r2, ri2);
  dft5_real<N>(im[0], im[1], im[2], im[3], im[4], i0, i1, ii1, i2, ii2);
  re[0] = r0, im[0] = i0;
  re[1] = N::fma(s, ii1, r1), im[1] = N::fnma(s, ri1, i1);
  re[2] = N::fma(s, ii2, r2), im[2] = N::fnma(s, ri2, i2);
  re[3] = N::fnma(s, ii2, r2), im[3] = N::fma(s, ri2, i2);
  re[4] = N::fnma(s, ii1, r1), im[4] = N::fma(s, ri1, i1);
}

// Multiplies (re, -kSine5 i) by exp(-2 pi i m / 25) for the angle whose cosine and sine these are.
template <typename N, typename V = typename N::Value>
MATPAC_HD void rotate(V& re, V& i, double cosine, double sine) {
  const V r = re, x = i;
  re = N::fnma(constant<N>(kSine5 * sine), x, constant<N>(cosine) * r);
  i = N::fma(constant<N>(-sine), r, constant<N>(-kSine5 * cosine) * x);
}

// A row: 25-point DFT of the real x(a), a = 5 a1 + a2, as 5 x 5. Calls y(i, value) for i = 0 ... 24, where 0 is
// column 0 and (2c - 1, 2c) are the real and imaginary part of column c.
template <typename N, typename Load, typename Store>
MATPAC_HD void row(const Load& x, const Store& y) {
  using V = typename N::Value;
  // cos and sin of 2 pi m / 25
  constexpr double c1 = 0.96858316112863110795, s1 = 0.24868988716485478824;
  constexpr double c2 = 0.87630668004386361157, s2 = 0.48175367410171526590;
  constexpr double c3 = 0.72896862742141155244, s3 = 0.68454710592868872761;
  constexpr double c4 = 0.53582679497899665848, s4 = 0.84432792550201508548;
  constexpr double c6 = 0.06279051952931337607, s6 = 0.99802672842827155195;
  constexpr double c8 = -0.42577929156507266097, s8 = 0.90482705246601952770;
  const V s = constant<N>(-kSine5);
  V zero[5], re1[5], im1[5], re2[5], im2[5];  // outputs 0, 1 and 2 of the DFTs over a1, by a2
  MATPAC_UNROLL
  for (int a2 = 0; a2 < 5; ++a2) {
    dft5_real<N>(x(a2), x(a2 + 5), x(a2 + 10), x(a2 + 15), x(a2 + 20), zero[a2], re1[a2], im1[a2], re2[a2], im2[a2]);
  }
  V dc, re5, i5, re10, i10;
  dft5_real<N>(zero[0], zero[1], zero[2], zero[3], zero[4], dc, re5, i5, re10, i10);
  y(0, dc), y(1, re5), y(2, s * i5), y(3, re10), y(4, s * i10);
  im1[0] = s * im1[0];
  rotate<N>(re1[1], im1[1], c1, s1);
  rotate<N>(re1[2], im1[2], c2, s2);
  rotate<N>(re1[3], im1[3], c3, s3);
  rotate<N>(re1[4], im1[4], c4, s4);
  dft5<N>(re1, im1);  // residues 1, 6, 11, 16, 21
  MATPAC_UNROLL
  for (int i = 0; i < 5; ++i) y(5 + 2 * i, re1[i]), y(6 + 2 * i, im1[i]);
  im2[0] = s * im2[0];
  rotate<N>(re2[1], im2[1], c2, s2);
  rotate<N>(re2[2], im2[2], c4, s4);
  rotate<N>(re2[3], im2[3], c6, s6);
  rotate<N>(re2[4], im2[4], c8, s8);
  dft5<N>(re2, im2);  // residues 2, 7, 12, 17, 22
  MATPAC_UNROLL
  for (int i = 0; i < 5; ++i) y(15 + 2 * i, re2[i]), y(16 + 2 * i, im2[i]);
}

// Cosine and tangent of an eighth of pi, and half of sqrt(2): the turns of a 16-point DFT.
constexpr double kCos16 = 0.92387953251128675613, kTan16 = 0.41421356237309504880, kRoot2 = 0.70710678118654752440;

// Outputs 0 ... 3 of a 4-point DFT whose inputs 0 and 2 came as their sum p and difference m, and whose inputs 1 and 3
// as (sum p13, difference m13) / scale.
template <typename N, typename V = typename N::Value, typename Store>
MATPAC_HD void finish4(V rp02, V ip02, V rm02, V im02, V rp13, V ip13, V rm13, V im13, V scale, const Store& power) {
  const auto emit = [&power](int k, V re, V im) { power(k, N::fma(im, im, re * re)); };
  emit(0, N::fma(scale, rp13, rp02), N::fma(scale, ip13, ip02));
  emit(1, N::fma(scale, im13, rm02), N::fnma(scale, rm13, im02));
  emit(2, N::fnma(scale, rp13, rp02), N::fnma(scale, ip13, ip02));
  emit(3, N::fnma(scale, im13, rm02), N::fma(scale, rm13, im02));
}

// A complex column, b = 4 b1 + b2, as 4 x 4: the squared magnitudes of the 16-point DFT of (re(b), im(b)). Calls
// power(j, value) for each j.
template <typename N, typename Re, typename Im, typename Store>
MATPAC_HD void column(const Re& load_re, const Im& load_im, const Store& power) {
  using V = typename N::Value;
  const V t = constant<N>(kTan16), c = constant<N>(kCos16), r = constant<N>(kRoot2);
  V re[4][4], im[4][4];  // [j][b2]: output j over b1
  MATPAC_UNROLL
  for (int b = 0; b < 4; ++b) {
    const V r0 = load_re(b), r1 = load_re(b + 4), r2 = load_re(b + 8), r3 = load_re(b + 12);
    const V i0 = load_im(b), i1 = load_im(b + 4), i2 = load_im(b + 8), i3 = load_im(b + 12);
    const V rp02 = r0 + r2, rm02 = r0 - r2, rp13 = r1 + r3, rm13 = r1 - r3;
    const V ip02 = i0 + i2, im02 = i0 - i2, ip13 = i1 + i3, im13 = i1 - i3;
    re[0][b] = rp02 + rp13, im[0][b] = ip02 + ip13;
    re[1][b] = rm02 + im13, im[1][b] = im02 - rm13;
    re[2][b] = rp02 - rp13, im[2][b] = ip02 - ip13;
    re[3][b] = rm02 - im13, im[3][b] = im02 + rm13;
  }
  // [j][b2] turns by j * b2 sixteenths of a circle; the common cosine of a pair is left to finish4.
  const auto bin = [&power](int j) { return [&power, j](int k, V value) { power(j + 4 * k, value); }; };
  {
    const V rp13 = re[0][1] + re[0][3], rm13 = re[0][1] - re[0][3];
    const V ip13 = im[0][1] + im[0][3], im13 = im[0][1] - im[0][3];
    const V rp02 = re[0][0] + re[0][2], rm02 = re[0][0] - re[0][2];
    const V ip02 = im[0][0] + im[0][2], im02 = im[0][0] - im[0][2];
    const auto emit = [&power](int k, V x, V y) { power(k, N::fma(y, y, x * x)); };
    emit(0, rp02 + rp13, ip02 + ip13);
    emit(4, rm02 + im13, im02 - rm13);
    emit(8, rp02 - rp13, ip02 - ip13);
    emit(12, rm02 - im13, im02 + rm13);
  }
  {
    const V x1 = N::fma(t, im[1][1], re[1][1]), y1 = N::fnma(t, re[1][1], im[1][1]);  // 1/16, over c
    const V x3 = N::fma(t, re[1][3], im[1][3]), y3 = N::fms(t, im[1][3], re[1][3]);   // 3/16, over c
    const V x2 = re[1][2] + im[1][2], y2 = im[1][2] - re[1][2];                       // 2/16, over r
    finish4<N>(N::fma(r, x2, re[1][0]), N::fma(r, y2, im[1][0]), N::fnma(r, x2, re[1][0]), N::fnma(r, y2, im[1][0]),
               x1 + x3, y1 + y3, x1 - x3, y1 - y3, c, bin(1));
  }
  {
    const V x1 = re[2][1] + im[2][1], y1 = im[2][1] - re[2][1];  // 2/16, over r
    const V x3 = im[2][3] - re[2][3], y3 = im[2][3] + re[2][3];  // 6/16, over (r, -r)
    finish4<N>(re[2][0] + im[2][2], im[2][0] - re[2][2], re[2][0] - im[2][2], im[2][0] + re[2][2],  // 4/16
               x1 + x3, y1 - y3, x1 - x3, y1 + y3, r, bin(2));
  }
  {
    const V x1 = N::fma(t, re[3][1], im[3][1]), y1 = N::fms(t, im[3][1], re[3][1]);   // 3/16, over c
    const V x3 = N::fma(t, im[3][3], re[3][3]), y3 = N::fnma(t, re[3][3], im[3][3]);  // 9/16, over -c
    const V x2 = im[3][2] - re[3][2], y2 = im[3][2] + re[3][2];                       // 6/16, over (r, -r)
    finish4<N>(N::fma(r, x2, re[3][0]), N::fnma(r, y2, im[3][0]), N::fnma(r, x2, re[3][0]), N::fma(r, y2, im[3][0]),
               x1 - x3, y1 - y3, x1 + x3, y1 + y3, c, bin(3));
  }
}

// The real column: power(j, value) for j = 0 ... 8; the others are the same again.
template <typename N, typename Load, typename Store>
MATPAC_HD void column_real(const Load& x, const Store& power) {
  using V = typename N::Value;
  const V t = constant<N>(kTan16), c = constant<N>(kCos16), r = constant<N>(kRoot2);
  V zero[4], two[4], re[4], im[4];  // outputs 0, 2 (real) and 1 of the DFTs over b1, by b2
  MATPAC_UNROLL
  for (int b = 0; b < 4; ++b) {
    const V x0 = x(b), x1 = x(b + 4), x2 = x(b + 8), x3 = x(b + 12);
    zero[b] = (x0 + x2) + (x1 + x3);
    two[b] = (x0 + x2) - (x1 + x3);
    re[b] = x0 - x2;
    im[b] = x3 - x1;
  }
  const V even = zero[0] + zero[2], odd = zero[1] + zero[3], m02 = zero[0] - zero[2], m13 = zero[1] - zero[3];
  const auto emit = [&power](int k, V a, V b) { power(k, N::fma(b, b, a * a)); };
  power(0, (even + odd) * (even + odd));
  power(8, (even - odd) * (even - odd));
  emit(4, m02, m13);
  const V m = two[1] - two[3], p = two[1] + two[3];
  emit(2, N::fma(r, m, two[0]), N::fma(r, p, two[2]));
  emit(6, N::fnma(r, m, two[0]), N::fnma(r, p, two[2]));
  const V x1 = N::fma(t, im[1], re[1]), y1 = N::fnma(t, re[1], im[1]);
  const V x3 = N::fma(t, re[3], im[3]), y3 = N::fms(t, im[3], re[3]);
  const V x2 = re[2] + im[2], y2 = im[2] - re[2];
  constexpr int bins[4] = {1, 5, 7, 3};  // outputs 9 and 13 are the conjugates of 7 and 3
  finish4<N>(N::fma(r, x2, re[0]), N::fma(r, y2, im[0]), N::fnma(r, x2, re[0]), N::fnma(r, y2, im[0]), x1 + x3, y1 + y3,
             x1 - x3, y1 - y3, c, [&](int k, V value) { power(bins[k], value); });
}

}  // namespace matpac::fft400
