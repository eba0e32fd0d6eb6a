// The instructions that the measurements are made of, one function each, so that no kernel body holds raw assembly.
//
// All are `asm volatile`: nvcc may neither drop nor merge them, whatever becomes of their results. Those that touch
// memory say so ("memory"), or stores written in C++ could be dropped as never read.
#pragma once

#include <cstdint>

namespace ptx {

// ---- clocks

/// Nanoseconds of a clock that all SMs share; it ticks coarsely (up to about 1 us).
__device__ __forceinline__ uint64_t global_nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

/// Cycles of the clock of the SM that this thread runs on.
__device__ __forceinline__ uint64_t sm_cycles() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
    return now;
}

// ---- 16-byte loads. Volatile or relaxed in PTX as well: of plain loads, ptxas takes those that do not change out of
// the loop, whatever the C++ compiler was told. (It did so with ld.shared::cluster.)

/// Address of an object in this block's shared memory, as the shared-memory instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 x;
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

}  // namespace ptx
