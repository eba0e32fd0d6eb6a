// Sizes by which the kernel works and pcfast/backends/cuda/tiling.py shares out that work.
//
// They stand here once for all of csrc/. constants.cu hands them to Python, whose mirror (pcfast/backends/cuda/geometry.py)
// is compared with them before a kernel is launched.
#pragma once

#include <cstdint>

#include "../tile/platform.cuh"
#include "../tile/shapes.h"

namespace pcfast::resident {

using tile::kBf16MmaK;
using tile::kMmaM;
using tile::kMmaN;
using tile::kTf32MmaK;
using tile::kWarpSize;

constexpr int kMaxLayers = 16;  // that Program has room for
// Threads of a block. They bound the registers of a thread to 128: 512 threads share an SM's 65,536.
constexpr int kMaxThreads = 512;
// Numbers of a block, and every size and stride in it: the kernel's quotients are exact below it, and so are sums of
// products of two of them in 64 bits.
constexpr int kMaxElements = 1 << 16;

constexpr int kVecSize = 4;   // numbers of one vector access
constexpr int kMaxGroup = 4;  // samples per lane of a linear product, and per thread of pointwise work

// Products in IEEE arithmetic.
constexpr int kFeedbackRowsPerLane = 4;      // kLinear, feedback: rows of A per lane
constexpr int kPositionsPerLane = 4;         // kConv: positions of the map per lane
// kConv: the rows of A per lane that are compiled. 5: the paper's MNIST network has five channels.
constexpr int kConvRows[] = {8, 5, 4, 1};

// Products on Tensor Cores: tiles of a unit.
constexpr int kMaxLinearTilesM = 4;  // kLinear: kMmaM features each
constexpr int kMaxConvTilesN = 4;    // kConv: kMmaN channels each; 1, 2 or 4
constexpr int kConvTilesM = 4;       // kConv: kMmaM positions each,
constexpr int kWideConvTilesM = 2;   // and of a unit of kMaxConvTilesN: fragments stay in registers

__host__ __device__ constexpr int conv_tiles_m(int tiles_n) {
  return tiles_n < kMaxConvTilesN ? kConvTilesM : kWideConvTilesM;
}

}  // namespace pcfast::resident
