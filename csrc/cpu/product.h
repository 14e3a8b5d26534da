// Products of small matrices, for kernels whose factors stay in a cache: tiles of the result stay in registers. A
// factor is stored as F and summed as T: F is T, or, where the instruction set multiplies bfloat16, a pair of those,
// two steps of the sum at once.
#pragma once

#include "bfloat16.h"

namespace matpac::MATPAC_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 12;  // of a tile; two vectors wide, it takes three quarters of the registers
#else
constexpr int kRows = 6;
#endif
template <typename T>
constexpr int kColumns = 2 * kLanes<T>;  // of a tile

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Two bfloat16 that follow each other along the sum.
struct Pair {
  BFloat16 first, second;
};

// What a factor that is stored as S is multiplied as, and how many steps of the sum one of those holds.
template <typename S>
struct FactorOf {
  using type = S;
};
template <>
struct FactorOf<BFloat16> {
#if defined(__AVX512BF16__)
  using type = Pair;
#else
  using type = float;
#endif
};
template <typename S>
using Factor = typename FactorOf<S>::type;
template <typename F>
constexpr int kSteps = 1;
template <>
inline constexpr int kSteps<Pair> = 2;
template <typename F>
constexpr int64_t steps(int64_t depth) {
  return (depth + kSteps<F> - 1) / kSteps<F>;
}

// x times each lane of b, added to c.
template <typename T>
MATPAC_INLINE Vector<T> multiply(T x, Vector<T> b, Vector<T> c) {
  return fma(broadcast(x), b, c);
}
#if defined(__AVX512BF16__)
MATPAC_INLINE __m512bh load(const Pair* from) { return (__m512bh)_mm512_loadu_si512(from); }
MATPAC_INLINE Vector<float> multiply(const Pair& x, __m512bh b, Vector<float> c) {
  int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(bits), b);
}
#endif

// c (kRows, kColumns), `c_row` apart, = or += a b over `depth`. a[r * a_row + k * a_step] is one factor; b has
// kColumns next to each other for each k.
template <bool kAdd, typename F, typename T>
MATPAC_INLINE void tile(const F* a, int64_t a_row, int64_t a_step, const F* b, int64_t depth, T* c, int64_t c_row) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sum[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = kAdd ? load(c + r * c_row) : Vector<T>{};
    sum[r][1] = kAdd ? load(c + r * c_row + lanes) : Vector<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const auto low = load(b + k * kColumns<T>), high = load(b + k * kColumns<T> + lanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const F& x = a[r * a_row + k * a_step];
      sum[r][0] = multiply(x, low, sum[r][0]);
      sum[r][1] = multiply(x, high, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    store(c + r * c_row, sum[r][0]);
    store(c + r * c_row + lanes, sum[r][1]);
  }
}

// A factor that is read where it lies; its rows are read up to the next multiple of kRows.
template <typename F>
struct Left {
  const F* at;
  int64_t row, step;
};
// A factor in panels of kColumns: panel p has column p * kColumns + j of step k at [p][k][j]. Zeros fill the last one.
template <typename F>
struct Panels {
  const F* at;
  int64_t depth;  // in steps
};

// c (rows, columns) = or += a b. Rows and columns are written up to whole tiles.
template <bool kAdd, typename F, typename T>
void product(Left<F> a, Panels<F> b, int64_t rows, int64_t columns, T* c, int64_t c_row) {
  for (int64_t j = 0; j < columns; j += kColumns<T>) {
    for (int64_t i = 0; i < rows; i += kRows) {
      tile<kAdd>(a.at + i * a.row, a.row, a.step, b.at + j * b.depth, b.depth, c + i * c_row + j, c_row);
    }
  }
}

// Panels of x (rows, width), whose rows are `row` apart.
template <typename S, typename T>
void pack(const S* x, int64_t row, int64_t rows, int64_t width, T* out) {
  for (int64_t j = 0; j < width; j += kColumns<T>) {
    const int64_t count = width - j < kColumns<T> ? width - j : int64_t(kColumns<T>);
    for (int64_t k = 0; k < rows; ++k) {
      const S* from = x + k * row + j;
      T* to = out + j * rows + k * kColumns<T>;
      if (count == kColumns<T>) {
        store(to, load_wide(from));
        store(to + kLanes<T>, load_wide(from + kLanes<T>));
        continue;
      }
      for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
      for (int64_t i = count; i < kColumns<T>; ++i) to[i] = T(0);
    }
  }
}

// Panels of x's transpose (width, rows).
template <typename S, typename T>
void pack_turned(const S* x, int64_t row, int64_t rows, int64_t width, T* out) {
  for (int64_t first = 0; first < up(rows, kColumns<T>); first += 4) {
    T* to = out + first / kColumns<T> * kColumns<T> * width + first % kColumns<T>;
    const int64_t count = rows - first < 4 ? rows - first : 4;
    for (int64_t k = count == 4 ? turn_four(x + first * row, row, width, to, kColumns<T>) : 0; k < width; ++k) {
      for (int64_t i = 0; i < 4; ++i) to[k * kColumns<T> + i] = i < count ? widen(x[(first + i) * row + k]) : T(0);
    }
  }
}

// x (rows, width), rows next to each other, and zeros up to whole tiles.
template <typename S, typename T>
void copy(const S* x, int64_t row, int64_t rows, int64_t width, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < width; ++k) out[i * width + k] = widen(x[i * row + k]);
  }
  for (int64_t i = rows * width; i < up(rows, kRows) * width; ++i) out[i] = T(0);
}

#if defined(__AVX512BF16__)

// For turn_four: pairs are moved as if they were floats.
MATPAC_INLINE Vector<float> load_wide(const Pair* from) {
  Vector<float> bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}

// Two rows of bfloat16 side by side.
MATPAC_INLINE __m512i pairs(__m256i first, __m256i second) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Whole __attribute__((vector_size(kVectorBytes)));
  return (__m512i)(__builtin_convertvector((Half)first, Whole) | __builtin_convertvector((Half)second, Whole) << 16);
}

// The same three of pairs, which lie along the sum: two rows of x side by side, or two columns. Zeros where it ends.
MATPAC_INLINE void pack(const BFloat16* x, int64_t row, int64_t rows, int64_t width, Pair* out) {
  constexpr int columns = kColumns<float>, lanes = kLanes<float>;
  for (int64_t j = 0; j < width; j += lanes) {
    const __mmask16 there = width - j < lanes ? __mmask16((1 << (width - j)) - 1) : __mmask16(-1);
    Pair* to = out + j / columns * columns * steps<Pair>(rows) + j % columns;
    for (int64_t k = 0; k < rows; k += 2, to += columns) {
      const BFloat16* from = x + k * row + j;
      const __mmask16 second = k + 1 < rows ? there : __mmask16(0);
      _mm512_storeu_si512(to,
                          pairs(_mm256_maskz_loadu_epi16(there, from), _mm256_maskz_loadu_epi16(second, from + row)));
    }
  }
  if (up(width, lanes) % columns == 0) return;
  Pair* to = out + width / columns * columns * steps<Pair>(rows) + lanes;
  for (int64_t k = 0; k < steps<Pair>(rows); ++k) _mm512_storeu_si512(to + k * columns, _mm512_setzero_si512());
}

MATPAC_INLINE void pack_turned(const BFloat16* x, int64_t row, int64_t rows, int64_t width, Pair* out) {
  constexpr int columns = kColumns<float>;
  constexpr BFloat16 zero{0};
  const int64_t deep = steps<Pair>(width);
  for (int64_t first = 0; first < up(rows, columns); first += 4) {
    Pair* to = out + first / columns * columns * deep + first % columns;
    const BFloat16* from = x + first * row;
    const int64_t count = rows - first < 4 ? rows - first : 4;
    int64_t k = 0;
    if (count == 4 && row % 2 == 0) {
      k = turn_four(reinterpret_cast<const Pair*>(from), row / 2, width / 2, reinterpret_cast<float*>(to), columns);
    }
    for (; k < deep; ++k) {
      for (int64_t i = 0; i < 4; ++i) {
        const BFloat16* pair = from + i * row + 2 * k;
        to[k * columns + i] = {i < count ? pair[0] : zero, i < count && 2 * k + 1 < width ? pair[1] : zero};
      }
    }
  }
}

MATPAC_INLINE void copy(const BFloat16* x, int64_t row, int64_t rows, int64_t width, Pair* out) {
  const int64_t whole = steps<Pair>(width);
  std::memset(static_cast<void*>(out), 0, size_t(up(rows, kRows) * whole) * sizeof(Pair));
  for (int64_t i = 0; i < rows; ++i) std::memcpy(static_cast<void*>(out + i * whole), x + i * row, size_t(2 * width));
}

#endif

}  // namespace matpac::MATPAC_ISA
