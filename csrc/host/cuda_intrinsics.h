// CUDA's built-in functions that kernel source calls, by CUDA's names, for a C++20 compiler.
//
// A barrier or shuffle takes where in the source it was called as its last parameter, which calls leave to its default:
// threads that meet at different calls are reported.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <source_location>

#include "barrier.h"
#include "bfloat16.h"

namespace pcfast::host {

constexpr unsigned kFullMask = 0xFFFFFFFFu;

template <class T>
struct ShuffleOperands {
  T value;
  unsigned source_lane;
  T result;
};

template <class T>
PCFAST_UNSEEN_BY_TSAN void shuffle_lanes(void* const* lanes) {
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    auto* own = static_cast<ShuffleOperands<T>*>(lanes[lane]);
    own->result = static_cast<ShuffleOperands<T>*>(lanes[own->source_lane % kWarpLanes])->value;
  }
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source_lane, const CallSite& site) {
  if (mask != kFullMask) fail(Fault::kDeadlock, "the mask names fewer than 32 lanes", site);
  ShuffleOperands<T> operands{value, source_lane, {}};
  warp_operation(site, &operands, shuffle_lanes<T>);
  return operands.result;
}

}  // namespace pcfast::host

inline void __syncthreads(std::source_location call_site = std::source_location::current()) {
  pcfast::host::block_barrier({"__syncthreads", call_site});
}

inline void __syncwarp(std::source_location call_site = std::source_location::current()) {
  pcfast::host::warp_barrier({"__syncwarp", call_site});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, std::source_location call_site = std::source_location::current()) {
  return pcfast::host::shuffle(mask, value, static_cast<unsigned>(lane), {"__shfl_sync", call_site});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                  std::source_location call_site = std::source_location::current()) {
  const unsigned source_lane = pcfast::host::this_thread().lane ^ static_cast<unsigned>(lane_mask);
  return pcfast::host::shuffle(mask, value, source_lane, {"__shfl_xor_sync", call_site});
}

inline int atomicAdd(int* target, int value) {
  return std::atomic_ref<int>(*target).fetch_add(value, std::memory_order_relaxed);
}

inline int atomicMin(int* target, int value) {
  std::atomic_ref<int> stored(*target);
  int before = stored.load(std::memory_order_relaxed);
  while (value < before && !stored.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
  return before;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// Both operands as they are in memory: other compilers than nvcc fuse a product with a subtraction too.
inline float __fsub_rn(float a, float b) {
  const volatile float rounded_a = a, rounded_b = b;
  return rounded_a - rounded_b;
}
inline double __dsub_rn(double a, double b) {
  const volatile double rounded_a = a, rounded_b = b;
  return rounded_a - rounded_b;
}

using __nv_bfloat16 = pcfast::host::Bfloat16;
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return pcfast::host::round_to_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return pcfast::host::widen_bfloat16(value); }
