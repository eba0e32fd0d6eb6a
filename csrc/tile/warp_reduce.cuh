// Reductions over a full warp, for float, double, int and unsigned. They order no memory accesses: that takes a
// __syncwarp().
#pragma once

#include "platform.cuh"

namespace pcfast::tile {

// A NaN loses against a number.
__device__ __forceinline__ float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return ::fmax(a, b); }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// Returns the sum over the warp, the same bits in every lane: a butterfly adds lanes 16, 8, 4, 2 and 1 apart.
template <class T>
__device__ __forceinline__ T warp_sum(T value PCFAST_AND_CALL_SITE) {
  PCFAST_UNROLL
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2)
    value += __shfl_xor_sync(kFullMask, value, apart PCFAST_AND_SAME_SITE);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value PCFAST_AND_CALL_SITE) {
  PCFAST_UNROLL
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2)
    value = larger(value, __shfl_xor_sync(kFullMask, value, apart PCFAST_AND_SAME_SITE));
  return value;
}

}  // namespace pcfast::tile
