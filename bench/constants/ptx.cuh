// The instructions that the measurements are made of, one function each, so that no kernel body holds raw assembly.
//
// All are `asm volatile`: nvcc may neither drop nor merge them, whatever becomes of their results. Those that touch
// memory say so ("memory"), or stores written in C++ could be dropped as never read.
//
// Clusters exist from compute capability 9.0 on. For older chips the cluster functions trap; the host never launches
// them there.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
#else
#define HAS_CLUSTERS 0
#endif

namespace ptx {

// ---- clocks

/// Nanoseconds of a clock that all multiprocessors share; it ticks coarsely (up to about 1 us).
__device__ __forceinline__ uint64_t global_nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

/// Cycles of the clock of the multiprocessor that this thread runs on.
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

/// Global memory from L2: a relaxed load at the scope of the whole chip may not be served by L1.
__device__ __forceinline__ uint4 load_l2(const uint4* pointer) {
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(pointer)
                 : "memory");
    return x;
}

// ---- flags between multiprocessors, through L2

/// The flag's value; what its writer wrote before it released the flag can be read after this.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// ---- clusters

/// Rank of this block in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank = 0;
#if HAS_CLUSTERS
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#else
    __trap();
#endif
    return rank;
}

/// Barrier of all threads of the cluster; shared memory written before it can be read after it, in the whole cluster.
__device__ __forceinline__ void cluster_barrier() {
#if HAS_CLUSTERS
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __trap();
#endif
}

/// The same without the release: it orders nothing that was written before it.
__device__ __forceinline__ void cluster_barrier_relaxed() {
#if HAS_CLUSTERS
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
    __trap();
#endif
}

/// Where block `rank` of the cluster holds what this block holds at `address`.
__device__ __forceinline__ uint32_t address_in_cluster(uint32_t address, uint32_t rank) {
    uint32_t remote = 0;
#if HAS_CLUSTERS
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
#else
    __trap();
#endif
    return remote;
}

/// Shared memory of any block of the cluster; `address` from address_in_cluster.
__device__ __forceinline__ uint4 load_cluster(uint32_t address) {
    uint4 x = {0, 0, 0, 0};
#if HAS_CLUSTERS
    asm volatile("ld.relaxed.cluster.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
#else
    __trap();
#endif
    return x;
}

}  // namespace ptx
