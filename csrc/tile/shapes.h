// Shapes that the hardware gives: of a warp, and of one mma.sync. Plain C++, for the host's code too.
#pragma once

namespace pcfast::tile {

constexpr int kWarpSize = 32;
// d (M x N) += a (M x K) b (K x N)
constexpr int kMmaM = 16;
constexpr int kMmaN = 8;
constexpr int kTf32MmaK = 8;
constexpr int kBf16MmaK = 16;

}  // namespace pcfast::tile
