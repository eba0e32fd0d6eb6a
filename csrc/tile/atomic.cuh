// Atomic operations on global or shared memory. They order no other memory accesses.
#pragma once

#include "platform.cuh"

#ifndef __CUDACC__
#include <atomic>
#endif

namespace pcfast::tile {

// Both return the value before.
__device__ __forceinline__ int atomic_add(int* target, int value) {
#ifdef __CUDACC__
  return atomicAdd(target, value);
#else
  return std::atomic_ref<int>(*target).fetch_add(value, std::memory_order_relaxed);
#endif
}

__device__ __forceinline__ int atomic_min(int* target, int value) {
#ifdef __CUDACC__
  return atomicMin(target, value);
#else
  std::atomic_ref<int> stored(*target);
  int before = stored.load(std::memory_order_relaxed);
  while (value < before && !stored.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
  return before;
#endif
}

}  // namespace pcfast::tile
