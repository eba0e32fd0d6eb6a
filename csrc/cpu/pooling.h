// Pools over a lane group. Windows may overlap, reach into the padding, or leave elements out.
#pragma once

#include "program.h"
#include "vector.h"

PCFAST_BEGIN

// The elements of one window that lie in the map: rows and columns of the window, whose corner may lie before the map.
struct Window {
  int pooled;  // the element that they become
  ptrdiff_t corner;
  int row;  // from one row of the map to the next
  int y0, y1, x0, x1;
  int divisor;

  // Calls visit(element of the map, its number in the window), in row-major order.
  template <class Visit>
  PCFAST_INLINE void over_elements(int columns, Visit visit) const {
    for (int i = y0; i < y1; ++i)
      for (int j = x0; j < x1; ++j) visit(corner + i * row + j, i * columns + j);
  }
};

template <class Visit>
PCFAST_INLINE void over_windows(const Pointwise& op, Visit visit) {
  const Pool& pool = op.pool;
  const int height = op.from.height, width = op.from.width;
  // of a window that begins at `begin`, what lies before `size`
  const auto before = [](int begin, int window, int size) { return size - begin < window ? size - begin : window; };
  Window window{};
  window.row = width;
  for (int c = 0; c < op.to.channels; ++c)
    for (int y = 0; y < op.to.height; ++y)
      for (int x = 0; x < op.to.width; ++x, ++window.pooled) {
        const int top = y * pool.stride_y - pool.padding_y, left = x * pool.stride_x - pool.padding_x;
        window.corner = (ptrdiff_t(c) * height + top) * width + left;
        window.y0 = top < 0 ? -top : 0, window.y1 = before(top, pool.window_y, height);
        window.x0 = left < 0 ? -left : 0, window.x1 = before(left, pool.window_x, width);
        window.divisor = pool.divisor;
        if (pool.divisor == 0)
          window.divisor = pool.counts_padding ? before(top, pool.window_y, height + pool.padding_y) *
                                                     before(left, pool.window_x, width + pool.padding_x)
                                               : (window.y1 - window.y0) * (window.x1 - window.x0);
        visit(window);
      }
}

// The pool of `map`, or of map + relative, which is as relative_to_winner gives it. winners: the number of the largest
// element of each window, the first of equals; NaN wins.
template <class T, int kVectors>
void pool(const Pointwise& op, const T* map, const T* relative, T* pooled, Integers<T>* winners) {
  const int columns = op.pool.window_x, size = op.pool.window();
  over_windows(op, [&](const Window& window) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const size_t at = size_t(window.pooled) * kVectors + j;
      const auto value_at = [&](ptrdiff_t from) { return load(map + (from * kVectors + j) * kLanes<T>); };
      if (op.pool.kind == kAvgPool) {
        const T share = T(1) / T(window.divisor);
        Vector<T> sum = {};
        window.over_elements(columns, [&](ptrdiff_t from, int) { sum += value_at(from) * share; });
        store(pooled + at * kLanes<T>, sum);
        continue;
      }
      Vector<T> best = {};
      Integers<T> winner = {};
      bool begun = false;
      window.over_elements(columns, [&](ptrdiff_t from, int k) {
        Vector<T> value = value_at(from);
        if (relative != nullptr)
          value = load(relative + ((size_t(window.pooled) * size + k) * kVectors + j) * kLanes<T>) + value;
        const auto wins = (value > best) | ((value != value) & (best == best));
        best = begun ? (wins ? value : best) : value;
        winner = begun ? (wins ? Integers<T>{} + k : winner) : Integers<T>{} + k;
        begun = true;
      });
      store(pooled + at * kLanes<T>, best);
      winners[at] = winner;
    }
  });
}

// The pool's transpose: elements of no window get zero.
template <class T, int kVectors>
void pull_back_pool(const Pointwise& op, const T* pooled, const Integers<T>* winners, T* map) {
  __builtin_memset(map, 0, size_t(op.from.size()) * kVectors * kLanes<T> * sizeof(T));
  over_windows(op, [&](const Window& window) {
    const T share = T(1) / T(window.divisor);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const size_t at = size_t(window.pooled) * kVectors + j;
      const Vector<T> value = load(pooled + at * kLanes<T>);
      window.over_elements(op.pool.window_x, [&](ptrdiff_t to, int k) {
        T* out = map + (to * kVectors + j) * kLanes<T>;
        if (op.pool.kind == kAvgPool)
          store(out, load(out) + value * share);
        else
          store(out, load(out) + (winners[at] == k ? value : Vector<T>{}));
      });
    }
  });
}

// map[k] - map[winner] of every element k of every window: what max-pooling in deviation form adds to.
template <class T, int kVectors>
void relative_to_winner(const Pointwise& op, const T* map, const T* pooled, T* relative) {
  const int size = op.pool.window();
  over_windows(op, [&](const Window& window) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> best = load(pooled + (size_t(window.pooled) * kVectors + j) * kLanes<T>);
      window.over_elements(op.pool.window_x, [&](ptrdiff_t from, int k) {
        store(relative + ((size_t(window.pooled) * size + k) * kVectors + j) * kLanes<T>,
              load(map + (from * kVectors + j) * kLanes<T>) - best);
      });
    }
  });
}

PCFAST_END
