// What kernel source needs from its compiler: nvcc, or a C++20 compiler that builds the same kernels for the CPU.
#pragma once

#include "shapes.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#else
#include <cstddef>
#include <cstdint>

#include "../host/cuda_on_host.h"
#endif

// The block's dynamic shared memory, as an unsigned char* of 128-byte alignment. On the CPU it starts out as NaNs.
#ifdef __CUDACC__
#define PCFAST_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define PCFAST_SHARED_MEMORY(name) unsigned char* const name = ::pcfast::host::shared_memory()
#endif

#ifdef __CUDACC__
#define PCFAST_UNROLL _Pragma("unroll")
#define PCFAST_UNROLL_TWICE _Pragma("unroll 2")
#define PCFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define PCFAST_UNROLL
#define PCFAST_UNROLL_TWICE
#define PCFAST_NO_UNROLL
#endif

// On the CPU every operation of several threads knows where in the source it stands, to report threads that meet
// at different places. These are its last parameter, alone or after others, and that parameter handed on.
#ifdef __CUDACC__
#define PCFAST_CALL_SITE
#define PCFAST_AND_CALL_SITE
#define PCFAST_AND_SAME_SITE
#else
#define PCFAST_CALL_SITE std::source_location call_site = std::source_location::current()
#define PCFAST_AND_CALL_SITE , PCFAST_CALL_SITE
#define PCFAST_AND_SAME_SITE , call_site
#endif

namespace pcfast::tile {

constexpr unsigned kFullMask = 0xFFFFFFFFu;  // all lanes of a warp

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// a - b of both as they are in memory: where a is a product, nvcc would fuse it with a subtraction that it can see, and a -
// a would be a's rounding error.
__device__ __forceinline__ float subtract_rn(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ double subtract_rn(double a, double b) { return __dsub_rn(a, b); }

// For blocks along x.
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

#ifdef __CUDACC__

// Address and size of an array in shared memory that no thread may touch, such as a gap between two others.
// Only AddressSanitizer heeds it; it works in steps of 8 bytes.
__device__ __forceinline__ void poison_shared(const void*, size_t) {}

// Shared memory that a kernel gets without asking for more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// Returns the cudaError_t: of this launch, or of earlier work that broke the CUDA context.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, A... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, args...);
  }
  // The caller has it from here; left behind, it would surface in somebody else's next check.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<int>(error);
}

#else

inline void poison_shared(const void* memory, size_t bytes) { host::poison(memory, bytes); }

// Returns 0, or the CUDA error of an impossible shape; throws host::LaunchError for a fault of the kernel.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/, A... args) {
  return host::launch(grid, block, shared_bytes, [&] { kernel(args...); });
}

#endif

}  // namespace pcfast::tile
