// Between torch's order, a row a sample, and a lane group's, [feature][lane].
#pragma once

#include "vector.h"

PCFAST_BEGIN

// A row a sample; `step` elements from one to the next.
template <class T>
struct Rows {
  T* at;
  size_t step;

  Rows from(int64_t sample) const { return {at + sample * step, step}; }
};

// Lanes without a sample become zero.
template <class T, int kGroup>
void gather(Rows<const T> rows, int samples, int features, T* group) {
  constexpr int kBlock = 16;  // features whose lines stay in L1
  for (int f = 0; f < features; f += kBlock) {
    const int count = features - f < kBlock ? features - f : kBlock;
    for (int n = 0; n < samples; ++n) {
      const T* row = rows.at + n * rows.step + f;
      T* to = group + size_t(f) * kGroup + n;
      for (int i = 0; i < count; ++i) to[i * kGroup] = row[i];
    }
  }
  if (samples < kGroup)
    for (int f = 0; f < features; ++f)
      for (int n = samples; n < kGroup; ++n) group[size_t(f) * kGroup + n] = T(0);
}

template <class T, int kGroup>
void scatter(const T* group, int samples, int features, Rows<T> rows) {
  constexpr int kBlock = 16;
  for (int f = 0; f < features; f += kBlock) {
    const int count = features - f < kBlock ? features - f : kBlock;
    for (int n = 0; n < samples; ++n) {
      T* row = rows.at + n * rows.step + f;
      const T* from = group + size_t(f) * kGroup + n;
      for (int i = 0; i < count; ++i) row[i] = from[i * kGroup];
    }
  }
}

PCFAST_END
