// Pools whose windows tile the map, over a lane group.
#pragma once

#include "program.h"
#include "vector.h"

PCFAST_BEGIN

// Calls visit(pooled element, element of the window, its number in the window) in row-major order, in lane groups.
template <class Visit>
PCFAST_INLINE void over_windows(const Layer& layer, Visit visit) {
  for (int c = 0; c < layer.out.channels; ++c)
    for (int y = 0; y < layer.out.height; ++y)
      for (int x = 0; x < layer.out.width; ++x) {
        const int pooled = (c * layer.out.height + y) * layer.out.width + x;
        for (int i = 0; i < layer.window_y; ++i)
          for (int j = 0; j < layer.window_x; ++j)
            visit(pooled, (c * layer.inner.height + y * layer.window_y + i) * layer.inner.width + x * layer.window_x + j,
                  i * layer.window_x + j);
      }
}

// The pool of `map`. winners: the number of the largest element of each window, the first of equals; NaN wins.
template <class T, int kVectors>
void pool(const Layer& layer, const T* map, T* pooled, Integers<T>* winners) {
  const T share = T(1) / T(layer.window_y * layer.window_x);
  over_windows(layer, [&](int to, int from, int k) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const size_t at = size_t(to) * kVectors + j;
      Vector<T> value = load(map + (size_t(from) * kVectors + j) * kLanes<T>), best = load(pooled + at * kLanes<T>);
      if (layer.pool == kAvgPool) {
        store(pooled + at * kLanes<T>, k == 0 ? value * share : best + value * share);
      } else if (k == 0) {
        store(pooled + at * kLanes<T>, value);
        winners[at] = Integers<T>{};
      } else {
        auto wins = (value > best) | ((value != value) & (best == best));
        store(pooled + at * kLanes<T>, wins ? value : best);
        winners[at] = wins ? Integers<T>{} + k : winners[at];
      }
    }
  });
}

// The pool's transpose: elements of no window get zero.
template <class T, int kVectors>
void pull_back_pool(const Layer& layer, const T* pooled, const Integers<T>* winners, T* map) {
  const T share = T(1) / T(layer.window_y * layer.window_x);
  __builtin_memset(map, 0, size_t(layer.inner.size()) * kVectors * kLanes<T> * sizeof(T));
  over_windows(layer, [&](int from, int to, int k) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const size_t at = size_t(from) * kVectors + j;
      Vector<T> value = load(pooled + at * kLanes<T>);
      T* out = map + (size_t(to) * kVectors + j) * kLanes<T>;
      if (layer.pool == kAvgPool)
        store(out, value * share);
      else
        store(out, winners[at] == k ? value : Vector<T>{});
    }
  });
}

// map[k] - map[winner]: what max-pooling in deviation form adds to. Elements of no window stay zero.
template <class T, int kVectors>
void relative_to_winner(const Layer& layer, const T* map, const T* pooled, T* relative) {
  __builtin_memset(relative, 0, size_t(layer.inner.size()) * kVectors * kLanes<T> * sizeof(T));
  over_windows(layer, [&](int to, int from, int) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const size_t at = (size_t(from) * kVectors + j) * kLanes<T>;
      store(relative + at, load(map + at) - load(pooled + (size_t(to) * kVectors + j) * kLanes<T>));
    }
  });
}

PCFAST_END
