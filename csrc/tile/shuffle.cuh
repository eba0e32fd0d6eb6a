// Values handed from lane to lane of a full warp. No memory is ordered by them: that takes a warp_barrier().
//
// For float, double, int and unsigned.
#pragma once

#include "platform.cuh"

namespace pcfast::tile {

#ifdef __CUDACC__

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

#else

template <class T>
struct ShuffleOperands {
  T value;
  unsigned source_lane;
  T result;
};

template <class T>
PCFAST_UNSEEN_BY_TSAN void shuffle_all(void* const* lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto* own = static_cast<ShuffleOperands<T>*>(lanes[lane]);
    own->result = static_cast<ShuffleOperands<T>*>(lanes[own->source_lane % kWarpSize])->value;
  }
}

template <class T>
T exchange(const char* operation, T value, unsigned source_lane, std::source_location call_site) {
  ShuffleOperands<T> operands{value, source_lane, {}};
  host::warp_operation({operation, call_site}, &operands, shuffle_all<T>);
  return operands.result;
}

#endif

// The value of lane `lane`, counted modulo 32.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane PCFAST_AND_CALL_SITE) {
#ifdef __CUDACC__
  return __shfl_sync(kAllLanes, value, lane);
#else
  return exchange("shuffle", value, static_cast<unsigned>(lane), call_site);
#endif
}

// The value of the lane whose index differs from this one's in the bits of `mask`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask PCFAST_AND_CALL_SITE) {
#ifdef __CUDACC__
  return __shfl_xor_sync(kAllLanes, value, mask);
#else
  return exchange("shuffle_xor", value, host::this_thread().lane ^ static_cast<unsigned>(mask), call_site);
#endif
}

// A NaN loses against a number.
__device__ __forceinline__ float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return ::fmax(a, b); }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// The sum over the warp, the same bits in every lane: lanes are added in pairs 16, 8, 4, 2 and 1 apart.
template <class T>
__device__ __forceinline__ T warp_sum(T value PCFAST_AND_CALL_SITE) {
  PCFAST_UNROLL
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) value += shuffle_xor(value, apart PCFAST_AND_SAME_SITE);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value PCFAST_AND_CALL_SITE) {
  PCFAST_UNROLL
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
    value = larger(value, shuffle_xor(value, apart PCFAST_AND_SAME_SITE));
  }
  return value;
}

}  // namespace pcfast::tile
