// Barriers: all threads of a block, or of a warp, wait for one another and see one another's writes.
//
// Every thread must reach the same barrier in the source. The GPU would also go on where some have returned or
// stand at another barrier; the CPU build reports both.
#pragma once

#include "platform.cuh"

namespace pcfast::tile {

__device__ __forceinline__ void block_barrier(PCFAST_CALL_SITE) {
#ifdef __CUDACC__
  __syncthreads();
#else
  host::block_barrier({"block_barrier", call_site});
#endif
}

__device__ __forceinline__ void warp_barrier(PCFAST_CALL_SITE) {
#ifdef __CUDACC__
  __syncwarp();
#else
  host::warp_barrier({"warp_barrier", call_site});
#endif
}

}  // namespace pcfast::tile
