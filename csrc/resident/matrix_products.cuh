// Matrix products of a stage on Tensor Cores: TF32 or bfloat16 operands, sums in float32.
//
// A unit is a few accumulator tiles of 16 x 8 elements and one split of their sum. State is read as float32 and rounded on
// its way into a fragment; weights were rounded when they were loaded. Inside a step (one mma.sync along k) the order of k
// is free as long as both operands agree on it, so lanes take what lies free of bank conflicts in shared memory: "k = t" in
// the pictures of mma.cuh is a position in the fragment, not an index of the sum.
#pragma once

#include "../tile/mma.cuh"
#include "../tile/platform.cuh"
#include "../tile/shared.cuh"
#include "program.h"

namespace pcfast::resident {

using tile::ceil_div;

struct Tf32 {
  static constexpr int kMmaK = kTf32MmaK;     // depth of a step
  static constexpr int kPerLane = kMmaK / 4;  // elements per lane of one row in a step

  // Rounds one row's elements into its two registers.
  __device__ static void round(uint32_t (&row)[2], const float (&x)[kPerLane]) {
    row[0] = tile::to_tf32(x[0]);
    row[1] = tile::to_tf32(x[1]);
  }
  // Packs elements that were rounded before.
  __device__ static void take(uint32_t (&row)[2], const float (&x)[kPerLane]) {
    row[0] = __float_as_uint(x[0]);
    row[1] = __float_as_uint(x[1]);
  }
  __device__ static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    tile::mma_tf32(sum, a, b);
  }
};

struct Bf16 {
  static constexpr int kMmaK = kBf16MmaK;
  static constexpr int kPerLane = kMmaK / 4;

  __device__ static void round(uint32_t (&row)[2], const float (&x)[kPerLane]) {
    row[0] = tile::pack_bf16(x[0], x[1]);
    row[1] = tile::pack_bf16(x[2], x[3]);
  }
  __device__ static void take(uint32_t (&row)[2], const float (&x)[kPerLane]) { round(row, x); }
  __device__ static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    tile::mma_bf16(sum, a, b);
  }
};

__device__ inline int quotient(int n, const Divisor& by) {
  return static_cast<int>(__umulhi(static_cast<uint32_t>(n) + 1, by.multiplier));
}

// One warp's work (program.h).
struct Unit {
  int split, tile, group;

  __device__ Unit(const Product& product, int index) {
    const int rest = quotient(index, product.by_splits);
    split = index - rest * product.by_splits.value;
    group = quotient(rest, product.by_tiles);
    tile = rest - group * product.by_tiles.value;
  }
};

// Makes the fragment a of a step from its rows g and g + 8.
__device__ inline void join(uint32_t (&a)[4], const uint32_t (&upper)[2], const uint32_t (&lower)[2]) {
  a[0] = upper[0], a[1] = lower[0], a[2] = upper[1], a[3] = lower[1];
}

// kLinear: M runs over features, N over samples. A unit has up to kMaxLinearTilesM tiles, side by side along M.

// Loads the weights of a unit's tiles as fragments a, step after step. Rows past the end hold arbitrary numbers: their sums
// are not stored.
template <class Operand, Stage kStage, int kTiles>
struct LinearWeights;

// [k][row] in float32, a row of it `weight_channel` long: k = 2t and 2t + 1 hit different banks (shared_memory.py). Tiles
// reach into the next row, and past the last one.
template <int kTiles>
struct LinearWeights<Tf32, Stage::kPredict, kTiles> {
  tile::SharedPointer<const float> even, odd;
  int step;

  __device__ LinearWeights(const Product& product, const float* memory, int row, int k, int lane)
      : even(memory + product.weights + (k + lane % 4 * 2) * product.weight_channel + row + lane / 4),
        odd(even + product.weight_channel),
        step(Tf32::kMmaK * product.weight_channel) {}
  __device__ void load(uint32_t (&a)[4], int tile) const {
    a[0] = __float_as_uint(even[tile * kMmaM]);
    a[1] = __float_as_uint(even[tile * kMmaM + 8]);
    a[2] = __float_as_uint(odd[tile * kMmaM]);
    a[3] = __float_as_uint(odd[tile * kMmaM + 8]);
  }
  __device__ void advance() {
    even += step;
    odd += step;
  }
};

// [row][k] in float32: k = t and t + 4 hit different banks.
template <int kTiles>
struct LinearWeights<Tf32, Stage::kFeedback, kTiles> {
  tile::SharedPointer<const float> rows[kTiles * 2];  // g and g + 8 of each tile

  __device__ LinearWeights(const Product& product, const float* memory, int row, int k, int lane) {
    PCFAST_UNROLL
    for (int i = 0; i < kTiles * 2; ++i)
      rows[i] = memory + product.weights + min(row + i * 8 + lane / 4, product.out - 1) * product.weight_row +
                (k + lane % 4);
  }
  __device__ void load(uint32_t (&a)[4], int tile) const {
    a[0] = __float_as_uint(rows[2 * tile][0]);
    a[1] = __float_as_uint(rows[2 * tile + 1][0]);
    a[2] = __float_as_uint(rows[2 * tile][4]);
    a[3] = __float_as_uint(rows[2 * tile + 1][4]);
  }
  __device__ void advance() {
    PCFAST_UNROLL
    for (auto& row : rows) row += Tf32::kMmaK;
  }
};

// In bfloat16, by ldmatrix: a lane's address is that of eight numbers of one k (prediction) or of one row (feedback).
template <Stage kStage, int kTiles>
struct LinearWeights<Bf16, kStage, kTiles> {
  tile::SharedPointer<const __nv_bfloat16> at[kTiles];
  int step;

  __device__ LinearWeights(const Product& product, const float* memory, int row, int k, int lane) {
    const auto* first = reinterpret_cast<const __nv_bfloat16*>(memory + product.weights);
    const int half = lane / 8 % 2 * 8, deep = k + lane / 16 * 8, within = lane % 8;
    step = Bf16::kMmaK * (kStage == Stage::kFeedback ? 1 : product.weight_channel);
    PCFAST_UNROLL
    for (int tile = 0; tile < kTiles; ++tile, row += kMmaM)
      if constexpr (kStage == Stage::kFeedback)
        at[tile] = first + min(row + half + within, product.out - 1) * product.weight_row + deep;
      else  // a row of the weights is a multiple of eight long
        at[tile] = first + (deep + within) * product.weight_channel + min(row + half, product.weight_channel - 8);
  }
  __device__ void load(uint32_t (&a)[4], int tile) const { tile::load_matrix<4, kStage == Stage::kPredict>(a, at[tile]); }
  __device__ void advance() {
    PCFAST_UNROLL
    for (auto& tile : at) tile += step;
  }
};

struct alignas(2 * sizeof(float)) Pair {
  float x[2];
};
__device__ inline Pair load_pair(const float* from) { return *reinterpret_cast<const Pair*>(from); }

// Loads one sample's elements of a step as the fragment b, in the weights' order of k. Rows of the state start at multiples
// of a vector.
template <class Operand, Stage kStage>
__device__ void load_sample(uint32_t (&b)[2], const tile::SharedPointer<const float>& input, int member) {
  if constexpr (Operand::kPerLane == 4) {
    const Pair low = load_pair(input + 2 * member), high = load_pair(input + (2 * member + 8));
    Operand::round(b, {low.x[0], low.x[1], high.x[0], high.x[1]});
  } else if constexpr (kStage == Stage::kFeedback) {
    Operand::round(b, {input[member], input[member + 4]});
  } else {
    Operand::round(b, load_pair(input + 2 * member).x);
  }
}

// Computes C[row][n] for a unit's kTiles tiles of rows and eight samples from `first_sample` on, of which `samples` exist.
template <class Operand, Stage kStage, int kTiles>
__device__ void linear_tiles(const Product& product, float* memory, int split, int first_row, int first_sample, int samples,
                             int lane) {
  const int begin = split * product.split, end = min(begin + product.split, product.channels);
  // the last sample stands in for those that do not exist
  tile::SharedPointer<const float> input =
      memory + product.input.first + (first_sample + min(lane / 4, samples - 1)) * product.input.samples + begin;
  LinearWeights<Operand, kStage, kTiles> weights(product, memory, first_row, begin, lane);

  float sum[kTiles][4] = {};
  PCFAST_UNROLL_TWICE
  for (int k = begin; k < end; k += Operand::kMmaK) {
    uint32_t b[2];
    load_sample<Operand, kStage>(b, input, lane % 4);
    PCFAST_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t a[4];
      weights.load(a, tile);
      Operand::multiply(sum[tile], a, b);
    }
    input += Operand::kMmaK;
    weights.advance();
  }
  const int row = first_row + tile::accumulator_row(lane, 0), rows = product.out - row;
  PCFAST_UNROLL
  for (int side = 0; side < 2; ++side) {
    const int n = tile::accumulator_column(lane, side);
    if (n >= samples) continue;
    const tile::SharedPointer<float> out = memory + product.scratch + split * product.scratch_split +
                                           (first_sample + n) * product.scratch_sample + row;
    PCFAST_UNROLL
    for (int i = 0; i < kTiles * 2; ++i)
      if (i * 8 < rows) out[i * 8] = sum[i / 2][i % 2 * 2 + side];
  }
}

template <class Operand, Stage kStage>
__device__ void run_linear_tiles(const Product& product, float* memory, const Unit& unit, int samples, int lane) {
  const int row = unit.tile * product.tiles * kMmaM, first = unit.group * kMmaN;
  if (first >= samples) return;
  switch (min(product.tiles, ceil_div(product.out - row, kMmaM))) {
    case 1:
      return linear_tiles<Operand, kStage, 1>(product, memory, unit.split, row, first, samples - first, lane);
    case 2:
      return linear_tiles<Operand, kStage, 2>(product, memory, unit.split, row, first, samples - first, lane);
    case 3:
      return linear_tiles<Operand, kStage, 3>(product, memory, unit.split, row, first, samples - first, lane);
    default:
      return linear_tiles<Operand, kStage, 4>(product, memory, unit.split, row, first, samples - first, lane);
  }
}

// Returns where position p of a product's map, all samples' positions one after another, reads its first element.
__device__ inline int input_offset(const Product& product, int p) {
  const int sample = quotient(p, product.by_area), inside = p - sample * product.by_area.value;
  const int y = quotient(inside, product.by_width), x = inside - y * product.width;
  return product.input.first + sample * product.input.samples + y * product.input.rows + x * product.input.columns;
}

// kConv, an implicit GEMM: M runs over positions of the map, all samples' one after another, N over output channels, K over
// terms (channel, tap). A unit of more tiles along N has fewer along M (conv_tiles_m): fragments stay in registers.

// Offsets of the input and the weight of one term of a sum from the first ones. Terms past the end have no weight.
struct Term {
  int32_t input, weight;
};
struct alignas(16) TermPair {
  Term term[2];
};
constexpr int kNoWeight = -1;

// Writes entry `slot` of a product's table of terms. A step's terms are dealt out to the four lanes of a row in turn: what
// the lanes read in one instruction lies side by side, mostly in different banks or in the same word.
template <class Operand>
__device__ void write_term(const Product& product, float* memory, int slot) {
  const int inside = slot % Operand::kMmaK;
  const int k = slot - inside + inside % Operand::kPerLane * 4 + inside / Operand::kPerLane;
  const int taps = product.taps_y * product.taps_x, channel = k / taps;
  const int tap_y = k % taps / product.taps_x, tap_x = k % product.taps_x;
  Term term{0, kNoWeight};
  if (channel < product.channels) {
    term.input = channel * product.input.channels + tap_y * product.input_tap_y + tap_x * product.input_tap_x;
    term.weight = channel * product.weight_channel + tap_y * product.weight_tap_y + tap_x * product.weight_tap_x;
  }
  reinterpret_cast<Term*>(memory + product.terms)[slot] = term;
}

template <class Operand, int kTilesN>
__device__ void implicit_gemm_tiles(const Product& product, float* memory, const Unit& unit, int samples, int lane) {
  constexpr int kTilesM = conv_tiles_m(kTilesN);
  const int first_column = unit.tile * kTilesN * kMmaN;
  const int first_position = unit.group * kTilesM * kMmaM;
  const int area = product.by_area.value, positions = samples * area;
  const int begin = unit.split * product.split, end = min(begin + product.split, product.term_count);

  tile::SharedPointer<const float> input[kTilesM][2];  // rows g and g + 8
  PCFAST_UNROLL
  for (int i = 0; i < kTilesM * 2; ++i) {
    const int p = min(first_position + i / 2 * kMmaM + i % 2 * 8 + lane / 4, positions - 1);
    input[i / 2][i % 2] = memory + input_offset(product, p);
  }
  tile::SharedPointer<const float> weights[kTilesN];
  PCFAST_UNROLL
  for (int c = 0; c < kTilesN; ++c)
    weights[c] = memory + product.weights +
                 min(first_column + c * kMmaN + lane / 4, product.out - 1) * product.weight_row;

  float sum[kTilesM][kTilesN][4] = {};
  for (int k = begin; k < end; k += Operand::kMmaK) {
    constexpr int kPerLane = Operand::kPerLane;
    Term term[kPerLane];
    const auto* pairs = reinterpret_cast<const TermPair*>(memory + product.terms) + (k + lane % 4 * kPerLane) / 2;
    PCFAST_UNROLL
    for (int i = 0; i < kPerLane / 2; ++i) {
      const TermPair pair = pairs[i];
      term[2 * i] = pair.term[0];
      term[2 * i + 1] = pair.term[1];
    }
    uint32_t b[kTilesN][2];
    PCFAST_UNROLL
    for (int c = 0; c < kTilesN; ++c) {
      float x[kPerLane];
      PCFAST_UNROLL
      for (int i = 0; i < kPerLane; ++i) x[i] = term[i].weight == kNoWeight ? 0.0f : weights[c][term[i].weight];
      Operand::take(b[c], x);
    }
    PCFAST_UNROLL
    for (int j = 0; j < kTilesM; ++j) {
      uint32_t rows[2][2], a[4];
      PCFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        float x[kPerLane];
        PCFAST_UNROLL
        for (int i = 0; i < kPerLane; ++i) x[i] = input[j][half][term[i].input];
        Operand::round(rows[half], x);
      }
      join(a, rows[0], rows[1]);
      PCFAST_UNROLL
      for (int c = 0; c < kTilesN; ++c) Operand::multiply(sum[j][c], a, b[c]);
    }
  }
  const int column = first_column + tile::accumulator_column(lane, 0), columns = product.out - column;
  float* out = memory + product.scratch + unit.split * product.scratch_split + column * area;
  PCFAST_UNROLL
  for (int j = 0; j < kTilesM; ++j)
    PCFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int p = first_position + j * kMmaM + half * 8 + lane / 4;
      if (p >= positions) continue;
      const int sample = quotient(p, product.by_area);
      const tile::SharedPointer<float> at = out + sample * product.scratch_sample + (p - sample * area);
      PCFAST_UNROLL
      for (int i = 0; i < kTilesN * 2; ++i) {
        const int next = i / 2 * kMmaN + i % 2;
        if (next < columns) at[next * area] = sum[j][i / 2][half * 2 + i % 2];
      }
    }
}

template <class Operand, Stage kStage>
__device__ void run_tensor_core_unit(const Product& product, float* memory, const Unit& unit, int samples, int lane) {
  if (product.kind == kLinear) return run_linear_tiles<Operand, kStage>(product, memory, unit, samples, lane);
  switch (product.tiles) {
    case 1:
      return implicit_gemm_tiles<Operand, 1>(product, memory, unit, samples, lane);
    case 2:
      return implicit_gemm_tiles<Operand, 2>(product, memory, unit, samples, lane);
    default:
      return implicit_gemm_tiles<Operand, 4>(product, memory, unit, samples, lane);
  }
}

}  // namespace pcfast::resident
