// Products of packed weights with the maps of a lane group, in register tiles.
//
// A map is stored as [channel][y][x][lane], the lanes being samples. So a product broadcasts weights and multiplies
// vectors of samples, whatever the widths; a lane's sum runs over the terms in their order, and depends on nothing else.
#pragma once

#include "program.h"
#include "vector.h"

PCFAST_BEGIN

// The taps of a convolution that lie inside the map for one position, as nested loops; one position and one tap: a
// linear layer. Steps of weights are in terms (of kRows weights each), those of the map in positions.
struct Taps {
  int channels, rows, columns;
  int weight, weight_channel, weight_row, weight_column;
  int map, map_channel, map_row, map_column;
};

template <class T, int kRows, int kVectors>
struct Accumulators {
  Vector<T> sum[kRows][kVectors];

  PCFAST_INLINE void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Vector<T>{};
  }
  PCFAST_INLINE void add(const T* weights, const T* panel) {
    Vector<T> right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(panel + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += weights[i] * right[j];
  }
  // With `adds` on top of what `out` holds.
  PCFAST_INLINE void write(T* out, size_t step, bool adds) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        T* to = out + i * step + j * kLanes<T>;
        store(to, adds ? load(to) + sum[i][j] : sum[i][j]);
      }
  }
};

// out[i] = sum over k of weights[k * weight_step + i] * panel[k * panel_step], i < kRows; with `adds` on top of what out
// holds.
template <class T, int kRows, int kVectors>
void linear_tile(const T* weights, size_t weight_step, const T* panel, size_t panel_step, int terms, T* out, size_t step,
                 bool adds) {
  Accumulators<T, kRows, kVectors> tile;
  tile.clear();
  for (int k = 0; k < terms; ++k) {
    tile.add(weights, panel);
    weights += weight_step;
    panel += panel_step;
  }
  if (adds)
    tile.write(out, step, true);
  else
    tile.write(out, step, false);
}

template <class T, int kRows, int kVectors>
void tap_tile(const T* weights, const T* map, const Taps& taps, T* out, size_t step, bool adds) {
  constexpr int kGroup = kVectors * kLanes<T>;
  Accumulators<T, kRows, kVectors> tile;
  tile.clear();
  for (int c = 0; c < taps.channels; ++c)
    for (int y = 0; y < taps.rows; ++y) {
      const T* w = weights + ptrdiff_t(taps.weight + c * taps.weight_channel + y * taps.weight_row) * kRows;
      const T* m = map + (ptrdiff_t(taps.map) + ptrdiff_t(c) * taps.map_channel + ptrdiff_t(y) * taps.map_row) * kGroup;
      for (int x = 0; x < taps.columns; ++x) {
        tile.add(w, m);
        w += taps.weight_column * kRows;
        m += ptrdiff_t(taps.map_column) * kGroup;
      }
    }
  tile.write(out, step, adds);
}

// A range of positions, and the steps between their rows and columns in two maps.
struct Range {
  int rows, columns;
  size_t left_row, left_column, right_row, right_column;
};

// sums[i][j] = sum over positions and lanes of left[i] * right[j], maps `left_channel` and `right_channel` apart: of one
// vector of lanes.
template <class T, int kRows, int kColumns>
void lane_tile(const T* left, size_t left_channel, const T* right, size_t right_channel, const Range& range, T* sums) {
  Vector<T> sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) sum[i][j] = Vector<T>{};
  for (int y = 0; y < range.rows; ++y) {
    const T *l = left + y * range.left_row, *r = right + y * range.right_row;
    for (int x = 0; x < range.columns; ++x) {
      Vector<T> second[kColumns];
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) second[j] = load(r + j * right_channel);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vector<T> first = load(l + i * left_channel);
#pragma GCC unroll 2
        for (int j = 0; j < kColumns; ++j) sum[i][j] += first * second[j];
      }
      l += range.left_column;
      r += range.right_column;
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sums[i * kColumns + j] = sum_of_lanes<T>(sum[i][j]);
}

template <class T>
using LaneTile = void (*)(const T*, size_t, const T*, size_t, const Range&, T*);
template <class T>
using LinearTile = void (*)(const T*, size_t, const T*, size_t, int, T*, size_t, bool);
template <class T>
using TapTile = void (*)(const T*, const T*, const Taps&, T*, size_t, bool);

// Tiles of 1 to kMaxRows rows.
template <class T, int kVectors>
struct Tiles {
  LinearTile<T> linear[kMaxRows];
  TapTile<T> tap[kMaxRows];
  LaneTile<T> lane[kMaxRows];  // of kVectors columns

  static const Tiles& all() {
    static constexpr Tiles tiles = make();
    return tiles;
  }

 private:
  template <int kRows>
  static constexpr void fill(Tiles& tiles) {
    tiles.linear[kRows - 1] = linear_tile<T, kRows, kVectors>;
    tiles.tap[kRows - 1] = tap_tile<T, kRows, kVectors>;
    tiles.lane[kRows - 1] = lane_tile<T, kRows, kVectors>;
    if constexpr (kRows > 1) fill<kRows - 1>(tiles);
  }
  static constexpr Tiles make() {
    Tiles tiles{};
    fill<kMaxRows>(tiles);
    return tiles;
  }
};

// Rows cut into as few blocks as possible, whose sizes differ by one at most.
struct Blocks {
  int rows, count;

  explicit Blocks(int rows) : rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {}
  int begin(int block) const { return static_cast<int>(int64_t(rows) * block / count); }
};

// A sum over many terms is the sum of parts, whose sizes differ by one at most: it rounds less than one long chain, and a
// panel of so many terms, two vectors wide, stays in L1 while all rows' tiles read it.
constexpr int kTermsAtOnce = 128, kTermsOfMany = 96;

struct Parts {
  int64_t terms;
  int64_t count;

  explicit Parts(int64_t terms, int each = 1)
      : terms(terms),
        count(terms * each > kTermsAtOnce ? (terms * each + kTermsOfMany - 1) / kTermsOfMany : 1) {
    if (count > terms) count = terms > 0 ? terms : 1;
  }
  int64_t begin(int64_t part) const { return terms * part / count; }
};

// Weights of a linear layer, times `scale`, as its products read them, from beginning to end: part after part, in each block after block,
// in each [term][row].
template <class T>
void pack_linear(const T* weights, T scale, int rows, size_t row_step, int terms, size_t term_step, T* packed) {
  const Blocks blocks(rows);
  const Parts parts(terms);
  for (int64_t part = 0; part < parts.count; ++part)
    for (int block = 0; block < blocks.count; ++block) {
      const int first = blocks.begin(block), last = blocks.begin(block + 1);
      for (int64_t k = parts.begin(part); k < parts.begin(part + 1); ++k)
        for (int i = first; i < last; ++i) *packed++ = weights[i * row_step + k * term_step] * scale;
    }
}

// The same of a convolution: block after block, each [term][row], where term = channel * taps + tap.
template <class T>
void pack(const T* weights, T scale, int rows, size_t row_step, int channels, size_t channel_step, int taps, T* packed) {
  const Blocks blocks(rows);
  for (int block = 0; block < blocks.count; ++block) {
    const int first = blocks.begin(block), last = blocks.begin(block + 1);
    for (int c = 0; c < channels; ++c)
      for (int tap = 0; tap < taps; ++tap)
        for (int i = first; i < last; ++i) *packed++ = weights[i * row_step + c * channel_step + tap] * scale;
  }
}

// Of a map `from` to the map `to`, a layer's prediction: to[y][x] reads from[y * stride - padding + tap].
inline Taps predict_taps(const Layer& layer, const Map& from, int y, int x) {
  const int top = y * layer.stride_y - layer.padding_y, left = x * layer.stride_x - layer.padding_x;
  const int y0 = top < 0 ? -top : 0, x0 = left < 0 ? -left : 0;
  const int y1 = from.height - top < layer.kernel_y ? from.height - top : layer.kernel_y;
  const int x1 = from.width - left < layer.kernel_x ? from.width - left : layer.kernel_x;
  return {from.channels, y1 > y0 ? y1 - y0 : 0, x1 > x0 ? x1 - x0 : 0,
          y0 * layer.kernel_x + x0, layer.taps(), layer.kernel_x, 1,
          (top + y0) * from.width + left + x0, from.positions(), from.width, 1};
}

// The transposed convolution: below[y][x] receives from above[(y + padding - tap) / stride] where that is whole.
inline Taps feedback_taps(const Layer& layer, const Map& above, int y, int x) {
  const int py = y + layer.padding_y, px = x + layer.padding_x;
  // the first tap that divides, and lies above the last position
  const auto first = [](int p, int stride, int size) {
    const int least = p - (size - 1) * stride;
    return least > p % stride ? least : p % stride;
  };
  const int y0 = first(py, layer.stride_y, above.height), x0 = first(px, layer.stride_x, above.width);
  const int y_end = py < layer.kernel_y - 1 ? py : layer.kernel_y - 1;
  const int x_end = px < layer.kernel_x - 1 ? px : layer.kernel_x - 1;
  return {above.channels,
          y_end >= y0 ? (y_end - y0) / layer.stride_y + 1 : 0,
          x_end >= x0 ? (x_end - x0) / layer.stride_x + 1 : 0,
          y0 * layer.kernel_x + x0, layer.taps(), layer.stride_y * layer.kernel_x, layer.stride_x,
          (py - y0) / layer.stride_y * above.width + (px - x0) / layer.stride_x, above.positions(), -above.width, -1};
}

// The weight gradient of a convolution, of one vector of lanes: weights[out][in][tap] = sum over positions and lanes of
// delta[out] * below[in], `delta` and `below` being maps of kGroup lanes; then bias[out], the sum of delta.
template <class T, int kGroup>
void convolution_gradient(const Layer& layer, const T* delta, const T* below, T* weights) {
  const int ins = layer.below().channels, taps = layer.taps();
  const size_t left_channel = size_t(layer.inner().positions()) * kGroup;
  const size_t right_channel = size_t(layer.below().positions()) * kGroup;
  const auto& pairs = Tiles<T, 2>::all();
  const auto& singles = Tiles<T, 1>::all();
  const Blocks blocks(layer.inner().channels);
  T sums[kMaxRows * 2];
  // the positions of the output whose tap lies inside the map
  const auto first = [](int padding, int tap, int stride) { return padding > tap ? (padding - tap + stride - 1) / stride : 0; };
  const auto end = [](int size, int padding, int tap, int stride, int out) {
    const int last = size - 1 + padding - tap < 0 ? -1 : (size - 1 + padding - tap) / stride;
    return last + 1 < out ? last + 1 : out;
  };
  for (int tap = 0; tap < taps; ++tap) {
    const int ty = tap / layer.kernel_x, tx = tap % layer.kernel_x;
    const int y0 = first(layer.padding_y, ty, layer.stride_y), x0 = first(layer.padding_x, tx, layer.stride_x);
    const int y1 = end(layer.below().height, layer.padding_y, ty, layer.stride_y, layer.inner().height);
    const int x1 = end(layer.below().width, layer.padding_x, tx, layer.stride_x, layer.inner().width);
    const Range range{y1 > y0 && x1 > x0 ? y1 - y0 : 0,
                      x1 - x0,
                      size_t(layer.inner().width) * kGroup,
                      kGroup,
                      size_t(layer.stride_y) * layer.below().width * kGroup,
                      size_t(layer.stride_x) * kGroup};
    const T* left = delta + (size_t(y0) * layer.inner().width + x0) * kGroup;
    const T* right = below + (ptrdiff_t(y0 * layer.stride_y - layer.padding_y + ty) * layer.below().width +
                              x0 * layer.stride_x - layer.padding_x + tx) * kGroup;
    for (int block = 0; block < blocks.count; ++block) {
      const int begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
      for (int in = 0; in < ins; in += 2) {
        const int columns = ins - in < 2 ? 1 : 2;
        const auto tile = columns == 2 ? pairs.lane[count - 1] : singles.lane[count - 1];
        const Parts parts(range.rows, range.columns);
        for (int64_t part = 0; part < parts.count; ++part) {
          const int y = static_cast<int>(parts.begin(part));
          Range now = range;
          now.rows = static_cast<int>(parts.begin(part + 1)) - y;
          tile(left + begin * left_channel + y * range.left_row, left_channel,
               right + in * right_channel + y * range.right_row, right_channel, now, sums);
          for (int i = 0; i < count; ++i)
            for (int j = 0; j < columns; ++j) {
              T& to = weights[(size_t(begin + i) * ins + in + j) * taps + tap];
              to = part == 0 ? sums[i * columns + j] : to + sums[i * columns + j];
            }
        }
      }
    }
  }
  T* bias = weights + size_t(layer.inner().channels) * ins * taps;
  for (int out = 0; out < layer.inner().channels; ++out) {
    Vector<T> sum = {};
    for (int y = 0; y < layer.inner().height; ++y) {
      Vector<T> row = {};
      for (int x = 0; x < layer.inner().width; ++x)
        row += load(delta + out * left_channel + (size_t(y) * layer.inner().width + x) * kGroup);
      sum += row;
    }
    bias[out] = sum_of_lanes<T>(sum);
  }
}

// One product of a lane group. `finish(first, count)` is called for every run of elements that is complete, in order.
template <class T, int kVectors, class Finish>
PCFAST_INLINE void multiply_linear(const T* packed, int rows, int terms, const T* from, T* to, Finish finish) {
  constexpr int kGroup = kVectors * kLanes<T>;
  const auto& tiles = Tiles<T, kVectors>::all();
  const Blocks blocks(rows);
  const Parts parts(terms);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t k = parts.begin(part);
    const int now = static_cast<int>(parts.begin(part + 1) - k);
    for (int block = 0; block < blocks.count; ++block) {
      const int first = blocks.begin(block), count = blocks.begin(block + 1) - first;
      tiles.linear[count - 1](packed + size_t(rows) * k + size_t(first) * now, count, from + k * kGroup, kGroup, now,
                              to + size_t(first) * kGroup, kGroup, part > 0);
      if (part + 1 == parts.count) finish(size_t(first) * kGroup, size_t(count) * kGroup);
    }
  }
}

// taps_at(y, x): of position (y, x) of the map that is computed, whose sizes are `map`.
template <class T, int kVectors, class TapsAt, class Finish>
PCFAST_INLINE void multiply_taps(const T* packed, int terms, const Map& map, const T* from, T* to, TapsAt taps_at,
                                 Finish finish) {
  constexpr int kGroup = kVectors * kLanes<T>;
  const auto& tiles = Tiles<T, kVectors>::all();
  const Blocks blocks(map.channels);
  const size_t channel = size_t(map.positions()) * kGroup;
  for (int block = 0; block < blocks.count; ++block) {
    const int first = blocks.begin(block), count = blocks.begin(block + 1) - first;
    T* out = to + first * channel;
    for (int y = 0; y < map.height; ++y)
      for (int x = 0; x < map.width; ++x) {
        const Taps taps = taps_at(y, x);
        const Parts parts(taps.channels, taps.rows * taps.columns);
        for (int64_t part = 0; part < parts.count; ++part) {
          const int begin = static_cast<int>(parts.begin(part));
          Taps now = taps;
          now.channels = static_cast<int>(parts.begin(part + 1)) - begin;
          now.weight += begin * taps.weight_channel;
          now.map += begin * taps.map_channel;
          tiles.tap[count - 1](packed + size_t(first) * terms, from, now, out + (size_t(y) * map.width + x) * kGroup,
                               channel, part > 0);
        }
      }
    finish(first * channel, count * channel);
  }
}

// out[i][j] = sum over k of left[k][i] * right[k][j] for the columns j of one panel. left_at(first, count, k, now): where
// `count` rows of `left` from `first` on begin, of terms k to k + now, as [term][row].
// copy_panel(k, count, panel) writes right[k][..] to right[k + count - 1][..] side by side, rows of a panel's width.
// Returns whether all of it is finite.
template <class T, class LeftAt, class CopyPanel>
PCFAST_INLINE bool outer_panel(LeftAt left_at, int rows, CopyPanel copy_panel, int columns, int64_t terms, T* out,
                               size_t out_step, T* panel) {
  constexpr int kWidth = kMaxVectors * kLanes<T>;
  const auto& tiles = Tiles<T, kMaxVectors>::all();
  const Blocks blocks(rows);
  const Parts parts(terms);
  alignas(64) T sum[kMaxRows * kWidth] = {};
  Vector<T> bad = {};
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t k = parts.begin(part);
    const int now = static_cast<int>(parts.begin(part + 1) - k);
    copy_panel(k, now, panel);
    for (int block = 0; block < blocks.count; ++block) {
      const int first = blocks.begin(block), count = blocks.begin(block + 1) - first;
      T* to = out + first * out_step;
      if (part > 0)
        for (int i = 0; i < count; ++i) __builtin_memcpy(sum + i * kWidth, to + i * out_step, columns * sizeof(T));
      tiles.linear[count - 1](left_at(first, count, k, now), count, panel, kWidth, now, sum, kWidth, part > 0);
      for (int i = 0; i < count; ++i) {
        for (int j = 0; j < kWidth; j += kLanes<T>) bad += load(sum + i * kWidth + j) * T(0);
        __builtin_memcpy(to + i * out_step, sum + i * kWidth, columns * sizeof(T));
      }
    }
  }
  for (int j = 0; j < kLanes<T>; ++j)
    if (bad[j] != bad[j]) return false;
  return true;
}

PCFAST_END
