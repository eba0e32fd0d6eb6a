// Asynchronous copies from global to shared memory.
//
// Copies belong to the group that the thread's next copy_commit() closes. A copy has arrived for its own thread
// after a copy_wait() that covers its group, and for the others after a __syncthreads() that follows. Until then
// the target holds no defined value; on the CPU it is NaN.
#pragma once

#include "platform.cuh"

namespace pcfast::tile {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// Copies kBytes bytes, or fills in zeros without reading where not `valid`. Both addresses are multiples of kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid PCFAST_AND_CALL_SITE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  const uint32_t target = shared_address(shared);
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // only this width can bypass the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
#else
  const host::CallSite site{"copy_async", call_site};
  host::require_aligned(shared, kBytes, site);
  host::require_aligned(global, kBytes, site);
  host::require_shared(shared, kBytes, site);
  host::this_thread().copies.issue(shared, valid ? global : nullptr, kBytes);
#endif
}

template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global PCFAST_AND_CALL_SITE) {
#ifdef __CUDACC__
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t target = shared_address(shared);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(kBytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(kBytes) : "memory");
  }
#else
  copy_async<kBytes>(shared, global, true PCFAST_AND_SAME_SITE);
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::this_thread().copies.commit();
#endif
}

// Waits for all of this thread's groups but the newest kGroupsLeft.
template <int kGroupsLeft>
__device__ __forceinline__ void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  host::this_thread().copies.wait(kGroupsLeft);
#endif
}

}  // namespace pcfast::tile
