// Asynchronous copies from global to shared memory.
//
// Copies belong to the group that the thread's next copy_commit() closes. A copy has arrived for its own thread
// after a copy_wait() that covers its group, and for the others after a block_barrier() that follows. Until then
// the target holds no defined value; on the CPU it is NaN.
#pragma once

#include "platform.cuh"

namespace pcfast::tile {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// Copies BYTES bytes, or fills in zeros without reading where not `valid`. Both addresses are multiples of BYTES.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid PCFAST_AND_CALL_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  const uint32_t target = shared_address(shared);
  const int source_bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {  // only this width can bypass the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(BYTES),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(BYTES),
                 "r"(source_bytes)
                 : "memory");
  }
#else
  const host::Place place{"copy_async", call_site};
  host::require_aligned(shared, BYTES, place);
  host::require_aligned(global, BYTES, place);
  host::require_shared(shared, BYTES, place);
  host::this_thread().copies.issue(shared, valid ? global : nullptr, BYTES);
#endif
}

template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global PCFAST_AND_CALL_SITE) {
#ifdef __CUDACC__
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t target = shared_address(shared);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(BYTES) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(BYTES) : "memory");
  }
#else
  copy_async<BYTES>(shared, global, true PCFAST_AND_SAME_SITE);
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::this_thread().copies.commit();
#endif
}

// Waits for all of this thread's groups but the newest GROUPS_LEFT.
template <int GROUPS_LEFT>
__device__ __forceinline__ void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
#else
  host::this_thread().copies.wait(GROUPS_LEFT);
#endif
}

}  // namespace pcfast::tile
