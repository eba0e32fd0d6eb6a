// Checks that a launch stays inside a block's shared memory and has the tensors that it reads. What arrives at the C
// interface are bytes, of this release or of another one, whole or not: none of them is trusted.
//
// How long the tensors are cannot be checked here: the caller answers for it, as for every pointer in C.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "geometry.h"
#include "program.h"

namespace pcfast::resident {

inline int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }
inline int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }
inline bool is_size(int64_t size) { return 1 <= size && size <= kMaxElements; }

// The elements of shared memory that an access reaches: from one element on, so many steps along each of its indices.
class Extent {
 public:
  explicit Extent(int64_t first) : low_(first), high_(first) {}

  Extent along(int64_t count, int64_t step) const {
    Extent longer = *this;
    longer.possible_ = possible_ && is_size(count) && -kMaxElements <= step && step <= kMaxElements;
    if (!longer.possible_) return longer;
    const int64_t way = (count - 1) * step;
    longer.low_ += std::min<int64_t>(way, 0);
    longer.high_ += std::max<int64_t>(way, 0);
    return longer;
  }
  bool inside(int64_t elements) const { return possible_ && 0 <= low_ && high_ < elements; }
  bool meets(const Extent& other) const { return low_ <= other.high_ && other.low_ <= high_; }

 private:
  int64_t low_, high_;
  bool possible_ = true;
};

inline bool is_exact(const Divisor& by) {
  return is_size(by.value) && by.multiplier == ((uint64_t{1} << 32) - 1) / by.value;
}
inline bool shares_out_work(const Layer& layer, int64_t groups) {
  return is_exact(layer.by_items) && layer.by_items.value >= layer.size &&
         layer.items == layer.by_items.value * groups;
}
inline int64_t splits_of(const Product& product) {
  return is_exact(product.by_splits) ? product.by_splits.value : -1;
}
inline int64_t lanes_of(const Product& product) {
  return 0 <= product.lanes_log2 && product.lanes_log2 <= 5 ? int64_t{1} << product.lanes_log2 : -1;
}
inline bool has_units(const Product& product, int64_t groups, int64_t tiles) {
  return is_exact(product.by_tiles) && product.by_tiles.value == tiles &&
         product.units == groups * tiles * product.by_splits.value;
}

class Validation {
 public:
  Validation(const Program& program, const Tensors& tensors, const RunParams& run, int scalar_bytes, int threads)
      : program_(program), tensors_(tensors), run_(run), scalar_bytes_(scalar_bytes), warps_(threads / kWarpSize) {}

  bool passes() {
    if (!sizes_are_possible()) return false;
    for (int l = 1; l <= program_.depth; ++l)
      if (!layer_fits(l)) return false;
    if (!output_fits() || !tensors_are_there()) return false;
    // Tables hold offsets: nothing else may be written there.
    for (std::size_t i = 0; i < tables_.size(); ++i) {
      for (const Extent& other : written_)
        if (tables_[i].meets(other)) return false;
      for (std::size_t j = 0; j < i; ++j)
        if (tables_[i].meets(tables_[j])) return false;
    }
    return true;
  }

 private:
  bool sizes_are_possible() const {
    const Program& p = program_;
    return 2 <= p.depth && p.depth <= kMaxLayers && is_size(p.elements) && is_size(p.samples) && 1 <= p.group &&
           p.group <= kMaxGroup && p.samples % p.group == 0 && (p.loss == kCrossEntropy || p.loss == kMse) &&
           (p.first_in_loop == 1 || p.first_in_loop == 2) && 1 <= run_.batch &&
           run_.batch <= INT32_MAX - kMaxElements && 0 <= run_.iterations && run_.iterations < INT32_MAX;
  }

  const Layer& layer(int l) const { return program_.layers[l - 1]; }
  bool gram() const { return program_.first_in_loop == 2; }
  bool inside(const Extent& extent) const { return extent.inside(program_.elements); }
  bool written(const Extent& extent) {
    written_.push_back(extent);
    return inside(extent);
  }

  Extent samples_of(int64_t first, int64_t a_sample) const { return Extent(first).along(program_.samples, a_sample); }
  Extent map(const StridedView& view, int64_t channels, int64_t height, int64_t width) const {
    return samples_of(view.first, view.samples)
        .along(channels, view.channels)
        .along(height, view.rows)
        .along(width, view.columns);
  }
  static int64_t inner(const Layer& l) { return int64_t{l.channels} * l.height * l.width; }

  bool layer_fits(int l) {
    const Layer& one = layer(l);
    const int64_t size = one.size;
    if (!is_size(one.channels) || !is_size(size) || !is_exact(one.by_area) || !is_exact(one.by_width))
      return false;
    if (size != int64_t{one.channels} * one.by_area.value || one.by_area.value % one.by_width.value) return false;
    if (!shares_out_work(one, program_.samples / program_.group)) return false;
    const int64_t width = one.by_width.value, height = one.by_area.value / width;
    const bool in_loop = program_.first_in_loop <= l && l < program_.depth;
    if (in_loop && !written(map(one.d, one.channels, height, width))) return false;
    if (!(run_.momentum == 0) && (in_loop || (l == 1 && gram()))) {
      const int64_t moving = in_loop ? size : inner(layer(2));
      if (!written(samples_of(one.velocity, one.velocity_sample).along(moving, 1))) return false;
    }
    return l == 1 ? one.gram == 0 : tail_fits(one, height, width) && loop_fits(l);
  }

  static bool tail_fits(const Layer& one, int64_t height, int64_t width) {
    for (const int64_t size : {int64_t{one.height}, int64_t{one.width}, int64_t{one.window_y}, int64_t{one.window_x}})
      if (!is_size(size)) return false;
    if (!is_exact(one.by_window_x) || one.by_window_x.value != one.window_x || !is_size(inner(one))) return false;
    if (one.pool == kNoPool)
      return one.window_y == 1 && one.window_x == 1 && one.height == height && one.width == width;
    if (one.pool != kMaxPool && one.pool != kAvgPool) return false;
    return height * one.window_y <= one.height && width * one.window_x <= one.width;
  }

  // For layers from the second on.
  bool loop_fits(int l) {
    const Layer& one = layer(l);
    if (one.gram != (gram() && l == 2) || (one.operand != kIeee && one.operand != kTf32 && one.operand != kBf16))
      return false;
    if (one.operand != kIeee && scalar_bytes_ != 4) return false;
    if (one.uhat_sample < inner(one) || !written(samples_of(one.uhat, one.uhat_sample).along(inner(one), 1)))
      return false;
    if (!written(map(one.delta, one.channels, one.height, one.width))) return false;
    if (one.weight_inputs < 0 || (one.weight_inputs > 0 && !weights_fit(one))) return false;
    if (!product_fits(one, one.predict, false, inner(one))) return false;
    if (one.gram) return one.feedback.kind == kNoProduct && one.feedback.term_count == 0;
    return product_fits(one, one.feedback, true, layer(l - 1).size);
  }

  bool weights_fit(const Layer& one) {
    if (one.weight_stride < one.channels) return false;
    const bool halves = one.operand == kBf16 && one.predict.kind == kLinear;
    const Extent kept = Extent(one.weights * (halves ? int64_t{2} : 1))
                            .along(one.weight_inputs, one.weight_stride)
                            .along(one.channels, 1);
    if (!halves) return written(kept);
    written_.push_back(Extent(one.weights).along(parts_of(one.weight_inputs, 2), one.weight_stride).along(one.channels, 1));
    return kept.inside(2 * int64_t{program_.elements});
  }

  // result: elements of the product's output per sample.
  bool product_fits(const Layer& one, const Product& product, bool feedback, int64_t result) {
    const int64_t splits = splits_of(product);
    for (const int64_t size : {int64_t{product.out}, int64_t{product.height}, int64_t{product.width}, splits})
      if (!is_size(size)) return false;
    if (int64_t{product.height} * product.width > kMaxElements ||
        int64_t{product.out} * (int64_t{product.height} * product.width) != result)
      return false;
    if (product.scratch_sample < result || product.scratch_split < program_.samples * result) return false;
    const Extent scratch = samples_of(product.scratch, product.scratch_sample).along(splits, product.scratch_split);
    if (!written(scratch.along(result, 1))) return false;
    if (product.kind == kCopy) return copy_fits(one, product, splits);
    for (const int64_t size : {int64_t{product.channels}, int64_t{product.taps_y}, int64_t{product.taps_x}})
      if (!is_size(size)) return false;
    if (int64_t{product.taps_y} * product.taps_x > kMaxElements) return false;
    if (product.channels * (int64_t{product.taps_y} * product.taps_x) > program_.elements) return false;
    if (product.kind == kLinear) return linear_fits(one, product, feedback, splits);
    return product.kind == kConv && conv_fits(one, product, splits);
  }

  bool copy_fits(const Layer& one, const Product& product, int64_t splits) const {
    return one.operand == kIeee && splits == 1 && product.term_count == 0 &&
           has_units(product, program_.samples, 1) &&
           inside(map(product.input, product.out, product.height, product.width));
  }

  // Whether splits of `split` terms, each a multiple of `depth`, cover `terms`.
  static bool covers(int64_t terms, int64_t splits, int64_t split, int64_t depth) {
    return is_size(split) && split % depth == 0 && splits * split >= terms && (splits - 1) * split < terms;
  }

  bool linear_fits(const Layer& one, const Product& product, bool feedback, int64_t splits) const {
    const int64_t depth = one.operand == kIeee ? kVecSize : one.operand == kTf32 ? kTf32MmaK : kBf16MmaK;
    const int64_t terms = padded(product.channels, depth), stride = feedback ? product.weight_row : product.weight_channel;
    if (product.height != 1 || product.width != 1 || product.term_count != 0) return false;
    if (!covers(product.channels, splits, product.split, depth)) return false;
    if (product.input.first % 4 || product.input.samples % 4 || product.weights % 4 || stride < 1 ||
        stride % (one.operand == kBf16 ? 8 : 4))
      return false;
    if (!inside(samples_of(product.input.first, product.input.samples).along(terms, 1))) return false;

    const bool on_tensor_cores = one.operand != kIeee;
    const int64_t lanes = feedback ? kWarpSize : lanes_of(product);
    if (!on_tensor_cores && (lanes < 1 || lanes > kWarpSize || (lanes & (lanes - 1)))) return false;
    if (on_tensor_cores && (product.tiles < 1 || product.tiles > kMaxLinearTilesM)) return false;
    const int64_t rows_per_lane = feedback ? kFeedbackRowsPerLane : kVecSize;
    const int64_t rows = on_tensor_cores ? int64_t{product.tiles} * kMmaM : lanes * rows_per_lane;
    const int64_t groups = on_tensor_cores ? parts_of(program_.samples, kMmaN) : program_.samples / program_.group;
    if (!has_units(product, groups, parts_of(product.out, rows))) return false;

    if (one.operand == kBf16) {
      const Extent first(2 * int64_t{product.weights});
      const Extent all = feedback ? first.along(product.out, stride).along(terms, 1)
                                  : first.along(terms, stride).along(stride, 1);
      return all.inside(2 * int64_t{program_.elements});
    }
    const Extent first(product.weights);
    if (feedback) return inside(first.along(product.out, stride).along(terms, 1));
    return inside(first.along(terms, stride).along(padded(product.out, on_tensor_cores ? kMmaM : kVecSize), 1));
  }

  bool conv_fits(const Layer& one, const Product& product, int64_t splits) {
    const int64_t area = int64_t{product.height} * product.width;
    const int64_t taps = int64_t{product.taps_y} * product.taps_x;
    if (!is_exact(product.by_area) || product.by_area.value != area || !is_exact(product.by_width) ||
        product.by_width.value != product.width)
      return false;
    const bool forward = product.weight_row == 1;
    if (product.input_tap_x != (forward ? 1 : -1)) return false;
    const Extent input = map(product.input, 1, product.height, product.width)
                             .along(product.channels, product.input.channels)
                             .along(product.taps_y, product.input_tap_y)
                             .along(product.taps_x, product.input_tap_x);
    const Extent weights = Extent(product.weights)
                               .along(product.channels, product.weight_channel)
                               .along(product.taps_y, product.weight_tap_y)
                               .along(product.taps_x, product.weight_tap_x);
    if (!inside(input) || !inside(weights.along(product.out, product.weight_row))) return false;
    const int64_t positions = program_.samples * area;

    if (one.operand == kIeee) {
      const int64_t rows = product.rows_per_thread, tiles = rows < 1 ? 0 : parts_of(product.out, rows);
      if (std::find(std::begin(kConvRows), std::end(kConvRows), rows) == std::end(kConvRows)) return false;
      if (forward && rows >= kVecSize) {  // read as vectors
        if (product.weights % 4 || product.weight_channel % 4 || product.weight_tap_y % 4 || product.weight_tap_x % 4)
          return false;
        if (rows % kVecSize && tiles > 1) return false;
        if (!inside(weights.along(tiles, rows).along(padded(rows, kVecSize), 1))) return false;
      }
      return product.term_count == 0 && covers(product.channels, splits, product.split, 1) &&
             has_units(product, parts_of(positions, kWarpSize * kPositionsPerLane), tiles);
    }
    const int64_t depth = one.operand == kTf32 ? kTf32MmaK : kBf16MmaK;
    if (product.tiles != 1 && product.tiles != 2 && product.tiles != kMaxConvTilesN) return false;
    if (!is_size(product.term_count) || product.term_count % depth || product.terms % 4) return false;
    if (product.channels * taps > product.term_count) return false;
    const Extent table = Extent(product.terms).along(product.term_count, 2).along(2, 1);
    tables_.push_back(table);
    const int64_t groups = parts_of(positions, conv_tiles_m(product.tiles) * kMmaM);
    return inside(table) && covers(product.term_count, splits, product.split, depth) &&
           has_units(product, groups, parts_of(product.out, int64_t{product.tiles} * kMmaN));
  }

  bool output_fits() {
    const Layer& last = layer(program_.depth);
    const auto rows = [&](int64_t first) {
      return samples_of(first, program_.classes_stride).along(program_.classes, 1);
    };
    return last.pool == kNoPool && last.by_area.value == 1 && program_.classes == last.channels &&
           program_.classes_stride >= program_.classes &&
           written(rows(program_.vhat)) && written(rows(program_.target)) && written(samples_of(program_.target_sum, 1)) &&
           // batch_weight (output.cuh) keeps a number per warp at the beginning of the scratch
           written(Extent(layer(2).predict.scratch).along(std::max(warps_, 1), 1));
  }

  bool tensors_are_there() const {
    const Tensors& t = tensors_;
    const int depth = program_.depth;
    if ((t.vhat_1 == nullptr) != gram() || (t.uhat_2 == nullptr) == gram()) return false;
    if (gram() && (!t.gram_sum || !t.gram_sum_before)) return false;
    if (!t.loss_rows || !t.first_bad || (!t.target && (program_.loss == kMse || !t.labels))) return false;
    for (int l = 1; l <= depth; ++l) {
      const int i = l - 1;
      if (l >= 2 && (!t.vhat[i] || (layer(l).weight_inputs > 0 && !t.weight[i]))) return false;
      if (l >= program_.first_in_loop && (!t.error[i] || (l < depth && !t.belief[i]))) return false;
      if (l >= 2 && t.local_error[depth - 1] && !t.local_error[i]) return false;
    }
    return true;
  }

  const Program& program_;
  const Tensors& tensors_;
  const RunParams& run_;
  const int scalar_bytes_, warps_;
  std::vector<Extent> written_, tables_;
};

}  // namespace pcfast::resident
