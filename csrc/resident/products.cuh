// Matrix products of a stage. Warps share them out as units; a unit keeps its sums in registers and stores them in the
// scratch, as partial sums where the product is split-K. Products in IEEE arithmetic are here, those on Tensor Cores in
// matrix_products.cuh.
//
// Results are deterministic: the order of a sum, over splits and inside one over lanes, depends on the layer alone, neither
// on the batch nor on the number of warps.
#pragma once

#include "../tile/platform.cuh"
#include "../tile/shared.cuh"
#include "../tile/warp_reduce.cuh"
#include "matrix_products.cuh"
#include "program.h"

namespace pcfast::resident {


template <class Real>
struct alignas(kVecSize * sizeof(Real) < 16 ? kVecSize * sizeof(Real) : 16) Vec {
  Real x[kVecSize];
};

template <class Real>
__device__ Vec<Real> load_vec(const Real* from) {
  return *reinterpret_cast<const Vec<Real>*>(from);
}

struct Warp {
  int index, count, lane;
};

// kLinear: samples that the last block lacks have zeros for state, and their elements in the scratch.

// kLinear, prediction: s[n][m] = sum_k W[k][m] d[n][k]. A lane has four rows m and every sample of its group. 2^lanes_log2
// lanes cover the rows of a tile; the warp's other lanes share the sum over k, vector by vector, and a butterfly adds it
// up.
template <class Real, int kSamples>
__device__ void linear_prediction(const Product& product, Real* memory, const Unit& unit, int lane) {
  const int lanes_log2 = product.lanes_log2, share = lane >> lanes_log2, sharing = kWarpSize >> lanes_log2;
  const int row = ((unit.tile << lanes_log2) + lane - (share << lanes_log2)) * kVecSize;
  const int first_sample = unit.group * kSamples;
  const bool active = row < product.out;
  const int begin = unit.split * product.split;
  const int end = min(begin + product.split, product.channels);

  Real sum[kVecSize][kSamples] = {};
  if (active) {
    const Real* weights = memory + product.weights + row;
    const Real* input = memory + product.input.first + first_sample * product.input.samples;
    for (int k = begin + share * kVecSize; k < end; k += sharing * kVecSize) {
      Vec<Real> b[kSamples];
      PCFAST_UNROLL
      for (int n = 0; n < kSamples; ++n) b[n] = load_vec(input + n * product.input.samples + k);
      PCFAST_UNROLL
      for (int j = 0; j < kVecSize; ++j) {
        Vec<Real> a = load_vec(weights + (k + j) * product.weight_channel);
        PCFAST_UNROLL
        for (int i = 0; i < kVecSize; ++i)
          PCFAST_UNROLL
          for (int n = 0; n < kSamples; ++n) sum[i][n] += a.x[i] * b[n].x[j];
      }
    }
  }
  for (int lanes = 1 << lanes_log2; lanes < kWarpSize; lanes *= 2)
    PCFAST_UNROLL
    for (int i = 0; i < kVecSize; ++i)
      PCFAST_UNROLL
      for (int n = 0; n < kSamples; ++n) sum[i][n] += __shfl_xor_sync(tile::kFullMask, sum[i][n], lanes);
  if (!active || share != 0) return;
  tile::SharedPointer<Real> out =
      memory + product.scratch + unit.split * product.scratch_split + first_sample * product.scratch_sample + row;
  const int rows = product.out - row;
  PCFAST_UNROLL
  for (int n = 0; n < kSamples; ++n, out += product.scratch_sample)
    PCFAST_UNROLL
    for (int i = 0; i < kVecSize; ++i)
      if (i < rows) out[i] = sum[i][n];
}

// kLinear, feedback: r[n][m] = sum_k W[m][k] delta[n][k]. A lane has rows m, m + 32, ... and every sample of its
// group.
template <class Real, int kSamples>
__device__ void linear_feedback(const Product& product, Real* memory, const Unit& unit, int lane) {
  const int row = unit.tile * kWarpSize * kFeedbackRowsPerLane + lane;
  const int first_sample = unit.group * kSamples;
  const int begin = unit.split * product.split;
  const int end = min(begin + product.split, product.channels);
  tile::SharedPointer<const Real> input[kSamples], weights[kFeedbackRowsPerLane];
  PCFAST_UNROLL
  for (int n = 0; n < kSamples; ++n)
    input[n] = memory + product.input.first + (first_sample + n) * product.input.samples + begin;
  PCFAST_UNROLL
  for (int i = 0; i < kFeedbackRowsPerLane; ++i)
    weights[i] = memory + product.weights + min(row + i * kWarpSize, product.out - 1) * product.weight_row + begin;

  Real sum[kFeedbackRowsPerLane][kSamples] = {};
  PCFAST_UNROLL_TWICE
  for (int k = begin; k < end; k += kVecSize) {
    Vec<Real> b[kSamples];
    PCFAST_UNROLL
    for (int n = 0; n < kSamples; ++n) {
      b[n] = load_vec<Real>(input[n]);
      input[n] += kVecSize;
    }
    PCFAST_UNROLL
    for (int i = 0; i < kFeedbackRowsPerLane; ++i) {
      Vec<Real> a = load_vec<Real>(weights[i]);
      weights[i] += kVecSize;
      PCFAST_UNROLL
      for (int j = 0; j < kVecSize; ++j)
        PCFAST_UNROLL
        for (int n = 0; n < kSamples; ++n) sum[i][n] += a.x[j] * b[n].x[j];
    }
  }
  tile::SharedPointer<Real> out =
      memory + product.scratch + unit.split * product.scratch_split + first_sample * product.scratch_sample + row;
  const int rows = product.out - row;
  PCFAST_UNROLL
  for (int n = 0; n < kSamples; ++n, out += product.scratch_sample)
    PCFAST_UNROLL
    for (int i = 0; i < kFeedbackRowsPerLane; ++i)
      if (i * kWarpSize < rows) out[i * kWarpSize] = sum[i][n];
}

// kConv, a direct convolution: lanes run over (sample, y, x); a lane has kRows rows of A at kPositionsPerLane positions.
// All lanes read the same weights of a term. In predictions those of the rows lie side by side, padded to a vector, and
// taps step to the right in B; in feedback to the left.
template <class Real, int kRows, Stage kStage>
__device__ void direct_conv(const Product& product, Real* memory, const Unit& unit, int samples, int lane) {
  const int row = unit.tile * kRows;
  const int position = unit.group * kWarpSize * kPositionsPerLane + lane;
  const int begin = unit.split * product.split;
  const int end = min(begin + product.split, product.channels);
  const int area = product.by_area.value, positions = samples * area;

  tile::SharedPointer<const Real> input[kPositionsPerLane];
  PCFAST_UNROLL
  for (int j = 0; j < kPositionsPerLane; ++j)
    input[j] = memory + input_offset(product, min(position + j * kWarpSize, positions - 1));
  constexpr bool kVectorized = kStage == Stage::kPredict && kRows >= kVecSize;
  constexpr int kPointers = kVectorized ? 1 : kRows;
  tile::SharedPointer<const Real> weights[kPointers];  // past the end the last row again: read, never stored
  PCFAST_UNROLL
  for (int i = 0; i < kPointers; ++i)
    weights[i] = memory + product.weights + min(row + i, product.out - 1) * product.weight_row;

  Real sum[kRows][kPositionsPerLane] = {};
  for (int channel = begin; channel < end; ++channel)
    for (int tap_y = 0; tap_y < product.taps_y; ++tap_y) {
      int a_step = channel * product.weight_channel + tap_y * product.weight_tap_y;
      int b_step = channel * product.input.channels + tap_y * product.input_tap_y;
      PCFAST_UNROLL_TWICE  // kernels have few taps per row
      for (int tap_x = 0; tap_x < product.taps_x; ++tap_x) {
        Real a[ceil_div(kRows, kVecSize) * kVecSize], b[kPositionsPerLane];
        if constexpr (kVectorized) {
          PCFAST_UNROLL
          for (int i = 0; i < kRows; i += kVecSize) {
            const Vec<Real> four = load_vec<Real>(weights[0] + (a_step + i));
            PCFAST_UNROLL
            for (int j = 0; j < kVecSize; ++j) a[i + j] = four.x[j];
          }
        } else {
          PCFAST_UNROLL
          for (int i = 0; i < kRows; ++i) a[i] = weights[i][a_step];
        }
        PCFAST_UNROLL
        for (int j = 0; j < kPositionsPerLane; ++j) b[j] = input[j][b_step];
        PCFAST_UNROLL
        for (int i = 0; i < kRows; ++i)
          PCFAST_UNROLL
          for (int j = 0; j < kPositionsPerLane; ++j) sum[i][j] += a[i] * b[j];
        a_step += product.weight_tap_x;
        b_step += kStage == Stage::kPredict ? 1 : -1;
      }
    }
  Real* out = memory + product.scratch + unit.split * product.scratch_split + row * area;
  const int rows = product.out - row;
  PCFAST_UNROLL
  for (int j = 0; j < kPositionsPerLane; ++j) {
    const int p = position + j * kWarpSize;
    if (p >= positions) continue;
    const int sample = quotient(p, product.by_area);
    tile::SharedPointer<Real> at = out + sample * product.scratch_sample + (p - sample * area);
    PCFAST_UNROLL
    for (int i = 0; i < kRows; ++i, at += area)
      if (i < rows) *at = sum[i][j];
  }
}

template <class Real, int kRows>
__device__ void run_direct_conv(const Product& product, Real* memory, const Unit& unit, int samples, int lane) {
  if (product.weight_row == 1)
    direct_conv<Real, kRows, Stage::kPredict>(product, memory, unit, samples, lane);
  else
    direct_conv<Real, kRows, Stage::kFeedback>(product, memory, unit, samples, lane);
}

// kCopy: copies one sample.
template <class Real>
__device__ void copy(const Product& product, Real* memory, int sample, int lane) {
  const int area = product.height * product.width;
  const Real* input = memory + product.input.first + sample * product.input.samples;
  Real* out = memory + product.scratch + sample * product.scratch_sample;
  for (int i = lane; i < product.out * area; i += kWarpSize)
    out[i] = input[i / area * product.input.channels + i % area / product.width * product.input.rows +
                   i % product.width * product.input.columns];
}

// kSamples: samples per lane.
template <Stage kStage, class Real, int kSamples>
__device__ void run_linear_unit(const Product& product, Real* memory, const Unit& unit, int lane) {
  if constexpr (kStage == Stage::kFeedback)
    linear_feedback<Real, kSamples>(product, memory, unit, lane);
  else
    linear_prediction<Real, kSamples>(product, memory, unit, lane);
}

// group: samples per lane of a linear product.
template <Stage kStage, class Real>
__device__ void run_unit(const Product& product, int operand, Real* memory, const Unit& unit, int group, int samples,
                         int lane) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (operand == kTf32) return run_tensor_core_unit<Tf32, kStage>(product, memory, unit, samples, lane);
    if (operand == kBf16) return run_tensor_core_unit<Bf16, kStage>(product, memory, unit, samples, lane);
  }
  switch (product.kind) {
    case kCopy:
      if (unit.group < samples) copy(product, memory, unit.group, lane);
      return;
    case kLinear:
      switch (group) {
        case 1:
          return run_linear_unit<kStage, Real, 1>(product, memory, unit, lane);
        case 2:
          return run_linear_unit<kStage, Real, 2>(product, memory, unit, lane);
        case 3:
          return run_linear_unit<kStage, Real, 3>(product, memory, unit, lane);
        default:
          return run_linear_unit<kStage, Real, kMaxGroup>(product, memory, unit, lane);
      }
    case kConv:
      switch (product.rows_per_thread) {
        case kConvRows[0]:
          return run_direct_conv<Real, kConvRows[0]>(product, memory, unit, samples, lane);
        case kConvRows[1]:
          return run_direct_conv<Real, kConvRows[1]>(product, memory, unit, samples, lane);
        case kConvRows[2]:
          return run_direct_conv<Real, kConvRows[2]>(product, memory, unit, samples, lane);
        default:
          return run_direct_conv<Real, kConvRows[3]>(product, memory, unit, samples, lane);
      }
    default:
      return;
  }
}

// Computes the products of layers `highest` down to `lowest`, counted from 1, shared out among the warps.
template <Stage kStage, class Real>
__device__ void products(const Program& program, Real* memory, int highest, int lowest, int samples, const Warp& warp) {
  int unit = warp.index;
  for (int l = highest; l >= lowest; --l) {
    const Layer& layer = program.layers[l - 1];
    const Product& product = kStage == Stage::kFeedback ? layer.feedback : layer.predict;
    for (; unit < product.units; unit += warp.count)
      run_unit<kStage>(product, layer.operand, memory, Unit(product, unit), program.group, samples, warp.lane);
    unit -= product.units;  // the next warps in turn start the next product
  }
}

// Returns the first partial sum of an element of a product.
template <class Real>
__device__ tile::SharedPointer<const Real> first_partial(const Product& product, const Real* memory, int sample,
                                                         int index) {
  return memory + product.scratch + sample * product.scratch_sample + index;
}

// The partial sums of each element of a split-K product.
struct Partials {
  int count, step;

  __device__ explicit Partials(const Product& product)
      : count(tile::in_register(product.by_splits.value)), step(tile::in_register(product.scratch_split)) {}
};

// Returns the sum of an element's partial sums, in order from the first, `partial`, on.
template <class Real>
__device__ Real reduce_partials(const Partials& partials, tile::SharedPointer<const Real> partial) {
  Real sum = *partial;
  int left = partials.count - 1;
  PCFAST_NO_UNROLL
  for (; left > 1; left -= 2) {
    const tile::SharedPointer<const Real> next = partial + partials.step;
    partial = next + partials.step;
    sum += *next;
    sum += *partial;
  }
  if (left > 0) sum += partial[partials.step];
  return sum;
}

}  // namespace pcfast::resident
