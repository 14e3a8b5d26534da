// Vectors of the instruction set that this pass compiles for (isa.h), as GCC and Clang spell them: the arithmetic,
// comparisons and `mask ? a : b` are the language's own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MATPAC_INLINE inline __attribute__((always_inline))
#define MATPAC_LAMBDA __attribute__((always_inline))

namespace matpac::MATPAC_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using Bits = typename VectorOf<T>::bits;  // integers as wide as T: masks and bit patterns
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Unaligned load and store.
template <typename T>
MATPAC_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <typename T>
MATPAC_INLINE void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof(v));
}

// x in every lane (x - 0 is x for every x; x + 0 is not).
template <typename T>
MATPAC_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// a * b + c, rounded once where the instruction set can.
MATPAC_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
MATPAC_INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The arithmetic of fft400.h on vectors.
template <typename T>
struct Lanes {
  using Scalar = T;
  using Value = Vector<T>;
  static MATPAC_INLINE Value set(T x) { return broadcast(x); }
  static MATPAC_INLINE Value fma(Value a, Value b, Value c) { return MATPAC_ISA::fma(a, b, c); }
  static MATPAC_INLINE Value fnma(Value a, Value b, Value c) { return MATPAC_ISA::fma(-a, b, c); }
  static MATPAC_INLINE Value fms(Value a, Value b, Value c) { return MATPAC_ISA::fma(a, b, -c); }
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)), for normal float32 numbers
  static MATPAC_INLINE void split(Value x, Value& e, Value& m) {
    const Bits<T> bits = reinterpret_cast<Bits<T>>(x);
    const Bits<T> exponent = (bits - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
    e = __builtin_convertvector(exponent, Value);
    m = reinterpret_cast<Value>(bits - (exponent << 23));
  }
};

// Four floats, whatever the instruction set.
typedef float Quad __attribute__((vector_size(16)));

// quads[0], quads[1] ... side by side.
MATPAC_INLINE Vector<float> join(const Quad* quads) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(quads[0]), quads[1], 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(low, quads[2], 2), quads[3], 3);
#elif defined(__AVX2__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(quads[0]), quads[1], 1);
#else
  return quads[0];
#endif
}

// In every quad: the floats i, j, k, l of the quads of a (0 ... 3) and b (4 ... 7).
template <int i, int j, int k, int l>
MATPAC_INLINE Vector<float> pick(Vector<float> a, Vector<float> b) {
#ifdef __clang__
#define MATPAC_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MATPAC_SHUFFLE(...) __builtin_shuffle(a, b, Bits<float>{__VA_ARGS__})
#endif
#define MATPAC_QUAD(q) MATPAC_AT(i) + q, MATPAC_AT(j) + q, MATPAC_AT(k) + q, MATPAC_AT(l) + q
#define MATPAC_AT(index) (index < 4 ? index : index - 4 + kLanes<float>)
#if defined(__AVX512F__)
  return MATPAC_SHUFFLE(MATPAC_QUAD(0), MATPAC_QUAD(4), MATPAC_QUAD(8), MATPAC_QUAD(12));
#elif defined(__AVX2__)
  return MATPAC_SHUFFLE(MATPAC_QUAD(0), MATPAC_QUAD(4));
#else
  return MATPAC_SHUFFLE(MATPAC_QUAD(0));
#endif
#undef MATPAC_AT
#undef MATPAC_QUAD
#undef MATPAC_SHUFFLE
}

// Turns the 4 x 4 block that the four vectors hold in each of their quads.
MATPAC_INLINE void turn(Vector<float> (&rows)[4]) {
  const Vector<float> low01 = pick<0, 4, 1, 5>(rows[0], rows[1]), high01 = pick<2, 6, 3, 7>(rows[0], rows[1]);
  const Vector<float> low23 = pick<0, 4, 1, 5>(rows[2], rows[3]), high23 = pick<2, 6, 3, 7>(rows[2], rows[3]);
  rows[0] = pick<0, 1, 4, 5>(low01, low23);
  rows[1] = pick<2, 3, 6, 7>(low01, low23);
  rows[2] = pick<0, 1, 4, 5>(high01, high23);
  rows[3] = pick<2, 3, 6, 7>(high01, high23);
}

}  // namespace matpac::MATPAC_ISA
