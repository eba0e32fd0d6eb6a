// Vectors in GCC's and Clang's portable form: as wide as the instruction set that this object file is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__)
#define PCFAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PCFAST_VECTOR_BYTES 32
#else
#define PCFAST_VECTOR_BYTES 16
#endif

// Every object file has its own namespace: the linker must not take one's functions for another's.
#define PCFAST_BEGIN namespace pcfast::cpu::PCFAST_ISA {
#define PCFAST_END }

#define PCFAST_INLINE inline __attribute__((always_inline))

PCFAST_BEGIN

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(PCFAST_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(PCFAST_VECTOR_BYTES)));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(PCFAST_VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(PCFAST_VECTOR_BYTES)));
};

template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
using Integers = typename Simd<T>::Integers;
template <class T>
constexpr int kLanes = PCFAST_VECTOR_BYTES / sizeof(T);

// Rows of a register tile two vectors wide: accumulators, two vectors of the panel and a broadcast fill the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows = 12;  // of 32 registers
#else
constexpr int kMaxRows = 6;  // of 16
#endif
constexpr int kMaxVectors = 2;

template <class T>
PCFAST_INLINE Vector<T> load(const T* from) {
  Vector<T> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
PCFAST_INLINE void store(T* to, Vector<T> value) {
  __builtin_memcpy(to, &value, sizeof value);
}

template <class T>
PCFAST_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <class T>
PCFAST_INLINE Vector<T> magnitude(Vector<T> value) {
  return value < 0 ? -value : value;
}

// Of lanes that are numbers: NaN is passed over.
template <class T>
PCFAST_INLINE T largest_lane(Vector<T> value) {
  T result = value[0];
  for (int i = 1; i < kLanes<T>; ++i) result = value[i] > result ? value[i] : result;
  return result;
}

// By halves: one order, whatever the lanes hold.
template <class T>
T sum_of_lanes(Vector<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

PCFAST_END
