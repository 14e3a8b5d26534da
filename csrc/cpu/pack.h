// 64 bytes of floats or doubles in as many vectors as the instruction set needs, and 2^x on them. A pack has the same
// lanes on every instruction set, so sums come out in the same order on all of them.
#pragma once

#include "simd.h"

// Vectors are passed between inlined functions only, so the ABI that GCC warns of never comes to bear.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace matpac::MATPAC_ISA {

template <typename T>
struct Pack {
  static constexpr int lanes = 64 / int(sizeof(T)), parts = lanes / kLanes<T>;
  Vector<T> part[parts];

  static MATPAC_INLINE Pack fill(T x) {
    Pack out;
    for (int i = 0; i < parts; ++i) out.part[i] = x - Vector<T>{};
    return out;
  }
  static MATPAC_INLINE Pack load(const T* from) {
    Pack out;
    for (int i = 0; i < parts; ++i) out.part[i] = MATPAC_ISA::load(from + i * kLanes<T>);
    return out;
  }
  // The first `n` lanes from memory; the others are `rest`.
  static MATPAC_INLINE Pack load(const T* from, int n, T rest) {
    T lane[lanes];
    for (int i = 0; i < lanes; ++i) lane[i] = i < n ? from[i] : rest;
    return load(lane);
  }
  MATPAC_INLINE void store(T* to) const {
    for (int i = 0; i < parts; ++i) MATPAC_ISA::store(to + i * kLanes<T>, part[i]);
  }
  // The first `n` lanes.
  MATPAC_INLINE void store(T* to, int n) const {
    T lane[lanes];
    store(lane);
    for (int i = 0; i < n; ++i) to[i] = lane[i];
  }
  MATPAC_INLINE double sum() const {
    T lane[lanes];
    store(lane);
    double out = 0;
    for (int i = 0; i < lanes; ++i) out += double(lane[i]);
    return out;
  }
  MATPAC_INLINE T largest() const {
    T lane[lanes];
    store(lane);
    T out = lane[0];
    for (int i = 1; i < lanes; ++i) out = lane[i] > out ? lane[i] : out;
    return out;
  }
};

template <typename T>
MATPAC_INLINE Pack<T> operator+(const Pack<T>& a, const Pack<T>& b) {
  Pack<T> out;
  for (int i = 0; i < Pack<T>::parts; ++i) out.part[i] = a.part[i] + b.part[i];
  return out;
}

template <typename T>
MATPAC_INLINE Pack<T> operator-(const Pack<T>& a, const Pack<T>& b) {
  Pack<T> out;
  for (int i = 0; i < Pack<T>::parts; ++i) out.part[i] = a.part[i] - b.part[i];
  return out;
}

template <typename T>
MATPAC_INLINE Pack<T> operator*(const Pack<T>& a, const Pack<T>& b) {
  Pack<T> out;
  for (int i = 0; i < Pack<T>::parts; ++i) out.part[i] = a.part[i] * b.part[i];
  return out;
}

// Lane by lane; where `a` is NaN, `b`.
template <typename T>
MATPAC_INLINE Pack<T> max(const Pack<T>& a, const Pack<T>& b) {
  Pack<T> out;
  for (int i = 0; i < Pack<T>::parts; ++i) out.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return out;
}

template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 23;
  static constexpr int degree = 7;            // of Taylor's polynomial: off by less than 6e-9 for |x| <= 1/2
  static constexpr float round = 0x1.8p23f;   // adding it leaves the nearest integer in the low bits
  static constexpr float smallest = -125.0f;  // below, 2^x counts as 0
};
template <>
struct Exp2<double> {
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 52;
  static constexpr int degree = 13;  // 5e-18
  static constexpr double round = 0x1.8p52;
  static constexpr double smallest = -1021.0;
};

// ln(2)^n / n!
struct Taylor {
  double term[14];
  constexpr Taylor() : term{1.0} {
    for (int n = 1; n < 14; ++n) term[n] = term[n - 1] * 0.693147180559945309417 / n;
  }
};
constexpr Taylor kTaylor;

// 2^x for x <= 0, to one unit in the last place; 0 below Exp2::smallest; NaN stays NaN.
template <typename T>
MATPAC_INLINE Pack<T> exp2(const Pack<T>& x) {
  using E = Exp2<T>;
  Pack<T> out;
  for (int i = 0; i < Pack<T>::parts; ++i) {
    const Vector<T> shifted = x.part[i] + E::round;
    const Vector<T> f = x.part[i] - (shifted - E::round);
    Vector<T> value = f * T(kTaylor.term[E::degree]) + T(kTaylor.term[E::degree - 1]);
#pragma GCC unroll 16
    for (int n = E::degree - 2; n >= 0; --n) value = value * f + T(kTaylor.term[n]);
    // The integer part goes into the exponent: the shift drops everything of `round` but that integer.
    using Bits = typename E::Bits;  // unsigned: what overflows is meant to be lost
    const Bits scaled = (Bits)value + ((Bits)shifted << E::mantissa);
    const Vector<T> number = x.part[i] == x.part[i] ? (Vector<T>)scaled : x.part[i];
    out.part[i] = x.part[i] < E::smallest ? Vector<T>{} : number;
  }
  return out;
}

}  // namespace matpac::MATPAC_ISA
