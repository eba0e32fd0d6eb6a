// exp, tanh, the logistic function and erfc on vectors, to a few units in the last place.
//
// Compilers may contract a * b + c into one rounding here: no function takes a difference that has to cancel exactly
// after a product.
#pragma once

#include "vector.h"

PCFAST_BEGIN

template <class T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;  // exp is 0 below, infinite above
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int32_t kUpperHalf = int32_t(0xFFFFF000);
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2 (Cephes)
  static constexpr float kExp[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                   8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  static constexpr int kErfcTerms = 16;
};
template <>
struct Constants<double> {
  static constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int64_t kUpperHalf = int64_t(0xFFFFFFFFF8000000);
  static constexpr double kExp[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,
                                    1.0 / 720,       1.0 / 5040,       1.0 / 40320,      1.0 / 362880,
                                    1.0 / 3628800,   1.0 / 39916800,   1.0 / 479001600., 1.0 / 6227020800.};
  static constexpr int kErfcTerms = 28;
};

// exp(r) - 1 for |r| <= kSmall.
template <class T>
constexpr T kSmall = T(0.3465);

template <class T>
PCFAST_INLINE Vector<T> expm1_small(Vector<T> r) {
  constexpr auto& coefficients = Constants<T>::kExp;
  constexpr int count = sizeof coefficients / sizeof(T);
  Vector<T> sum = broadcast<T>(coefficients[count - 1]);
#pragma GCC unroll 16
  for (int i = count - 2; i >= 0; --i) sum = sum * r + coefficients[i];
  return sum * (r * r) + r;
}

template <class T>
struct Reduced {
  Vector<T> rest;         // exp(x) = (1 + rest) * 2^exponent
  Integers<T> exponent;
};

template <class T>
PCFAST_INLINE Reduced<T> reduce(Vector<T> x) {
  using C = Constants<T>;
  Vector<T> shifted = x * T(1.44269504088896340736) + C::kShift;
  Vector<T> rounded = shifted - C::kShift;
  Vector<T> r = x - rounded * C::kLn2High;
  r = r - rounded * C::kLn2Low;
  Integers<T> exponent = (Integers<T>)shifted - (Integers<T>)broadcast<T>(C::kShift);
  return {expm1_small<T>(r), exponent};
}

template <class T>
PCFAST_INLINE Vector<T> power_of_two(Integers<T> exponent) {
  return (Vector<T>)((exponent + Constants<T>::kBias) << Constants<T>::kMantissa);
}

template <class T>
PCFAST_INLINE Vector<T> exp(Vector<T> x) {
  using C = Constants<T>;
  // comparisons are written so that NaN passes
  x = x < C::kLowest ? broadcast<T>(C::kLowest) : x;
  x = x > C::kHighest ? broadcast<T>(C::kHighest) : x;
  Reduced<T> at = reduce<T>(x);
  // in two steps: 2^exponent itself may be out of range where the result is not, or is subnormal
  Integers<T> half = at.exponent >> 1;
  return (at.rest + T(1)) * power_of_two<T>(half) * power_of_two<T>(at.exponent - half);
}

template <class T>
PCFAST_INLINE Vector<T> tanh(Vector<T> x) {
  // with m = exp(2 |x|) - 1: m / (m + 2), which keeps its digits near zero
  constexpr T most = sizeof(T) == 4 ? T(20) : T(40);
  Vector<T> twice = magnitude<T>(x) * T(2);
  twice = twice > most ? broadcast<T>(most) : twice;
  Reduced<T> at = reduce<T>(twice);
  Vector<T> scale = power_of_two<T>(at.exponent);
  Vector<T> m = scale * at.rest + (scale - T(1));
  Vector<T> result = m / (m + T(2));
  return x < 0 ? -result : result;
}

// tanh for |x| <= kTanhSmall: fewer operations.
template <class T>
PCFAST_INLINE Vector<T> tanh_small(Vector<T> x) {
  if constexpr (sizeof(T) == 4) {
    Vector<T> square = x * x;
    Vector<T> sum = square * T(-17.0 / 315) + T(2.0 / 15);
    sum = sum * square + T(-1.0 / 3);
    return sum * square * x + x;
  } else {
    Vector<T> m = expm1_small<T>(x * T(2));
    return m / (m + T(2));
  }
}
template <class T>
constexpr T kTanhSmall = T(0.17);

template <class T>
struct Sigmoids {
  Vector<T> p, q;  // of x and -x, both with full relative accuracy
};

template <class T>
PCFAST_INLINE Sigmoids<T> sigmoids(Vector<T> x) {
  Vector<T> e = exp<T>(-magnitude<T>(x));
  Vector<T> large = T(1) / (T(1) + e), small = e * large;
  return {x > 0 ? large : small, x > 0 ? small : large};
}

template <class T>
PCFAST_INLINE Vector<T> normal_density(Vector<T> u) {
  return exp<T>(u * u * T(-0.5)) * T(0.3989422804014326779);
}

// 1 - erf(x) with small relative error: Chebyshev's form of exp(x^2) erfc(x) / t, t = 2 / (2 + x)
// (Press et al., Numerical Recipes, 3rd edition, 6.2.2).
template <class T>
PCFAST_INLINE Vector<T> erfc(Vector<T> x) {
  static constexpr double coefficients[28] = {
      -1.3026537197817094, 6.4196979235649026e-1, 1.9476473204185836e-2, -9.561514786808631e-3, -9.46595344482036e-4,
      3.66839497852761e-4, 4.2523324806907e-5,    -2.0278578112534e-5,   -1.624290004647e-6,    1.303655835580e-6,
      1.5626441722e-8,     -8.5238095915e-8,      6.529054439e-9,        5.059343495e-9,        -9.91364156e-10,
      -2.27365122e-10,     9.6467911e-11,         2.394038e-12,          -6.886027e-12,         8.94487e-13,
      3.13092e-13,         -1.12708e-13,          3.81e-16,              7.106e-15,             -1.523e-15,
      -9.4e-17,            1.21e-16,              -2.8e-17};
  Vector<T> z = magnitude<T>(x);
  Vector<T> t = T(2) / (z + T(2)), y = t * T(4) - T(2);
  Vector<T> above = {}, sum = {};
  for (int i = Constants<T>::kErfcTerms - 1; i > 0; --i) {
    Vector<T> next = y * sum - above + T(coefficients[i]);
    above = sum;
    sum = next;
  }
  Vector<T> series = (y * sum + T(coefficients[0])) * T(0.5) - above;
  // z^2 as the square of its upper half, which is exact, and a rest: rounding it would count z^2 times
  Vector<T> upper = (Vector<T>)((Integers<T>)z & Constants<T>::kUpperHalf);
  Vector<T> tail = t * exp<T>(-(upper * upper)) * exp<T>(series - (z - upper) * (z + upper));
  return x < 0 ? T(2) - tail : tail;
}

PCFAST_END
