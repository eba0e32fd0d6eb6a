// One kernel for each tile operation: registers in, registers out, lane by lane, in one block of one warp.
#pragma once

#include "tile/copy.cuh"
#include "tile/mma.cuh"
#include "tile/warp_reduce.cuh"

namespace operations {

namespace tile = pcfast::tile;

__global__ void multiply_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  const int lane = tile::lane_index();
  float own_d[4];
  uint32_t own_a[4], own_b[2];
  for (int i = 0; i < 4; ++i) own_d[i] = d[lane * 4 + i];
  for (int i = 0; i < 4; ++i) own_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) own_b[i] = b[lane * 2 + i];
  tile::mma_bf16(own_d, own_a, own_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = own_d[i];
}

__global__ void multiply_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  const int lane = tile::lane_index();
  float own_d[4];
  uint32_t own_a[4], own_b[2];
  for (int i = 0; i < 4; ++i) own_d[i] = d[lane * 4 + i];
  for (int i = 0; i < 4; ++i) own_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) own_b[i] = b[lane * 2 + i];
  tile::mma_tf32(own_d, own_a, own_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = own_d[i];
}

// `rows` holds 32 rows of 16 bytes; lane l loads from row order[l].
template <int kCount, bool kTransposed>
__global__ void load_matrix(uint32_t* registers, const uint4* rows, const int* order) {
  PCFAST_SHARED_MEMORY(shared);
  auto* shared_rows = reinterpret_cast<uint4*>(shared);
  const int lane = tile::lane_index();
  shared_rows[lane] = rows[lane];
  __syncthreads();
  uint32_t own[kCount];
  tile::load_matrix<kCount, kTransposed>(own, shared_rows + order[lane]);
  for (int i = 0; i < kCount; ++i) registers[lane * kCount + i] = own[i];
}

template <class T>
struct Shuffled {
  T from_lane, from_xor, sum, max;
};

template <class T>
__global__ void shuffle(Shuffled<T>* results, const T* values, const int* lanes, int mask) {
  const int lane = tile::lane_index();
  const T value = values[lane];
  results[lane] = {__shfl_sync(tile::kFullMask, value, lanes[lane]), __shfl_xor_sync(tile::kFullMask, value, mask), tile::warp_sum(value),
                   tile::warp_max(value)};
}

// Two groups of one copy a lane, the second only where valid; `seen` is the shared memory before any wait, after
// the wait for the first group, and after the wait for both.
template <int kBytes>
__global__ void copy(unsigned char* seen, const unsigned char* global, const int* valid) {
  PCFAST_SHARED_MEMORY(shared);
  constexpr int kGroupBytes = tile::kWarpSize * kBytes;
  const int lane = tile::lane_index();
  const auto look = [&](int moment) {
    __syncthreads();
    for (int i = lane; i < 2 * kGroupBytes; i += tile::kWarpSize) seen[moment * 2 * kGroupBytes + i] = shared[i];
    __syncthreads();
  };
  tile::copy_async<kBytes>(shared + lane * kBytes, global + lane * kBytes);
  tile::copy_commit();
  tile::copy_async<kBytes>(shared + kGroupBytes + lane * kBytes, global + kGroupBytes + lane * kBytes, valid[lane] != 0);
  tile::copy_commit();
  look(0);
  tile::copy_wait<1>();
  look(1);
  tile::copy_wait<0>();
  look(2);
}

__global__ void convert(uint16_t* bf16, uint32_t* tf32, uint32_t* packed, const float* values, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const __nv_bfloat16 rounded = __float2bfloat16_rn(values[i]);
  bf16[i] = static_cast<uint16_t>(__float_as_uint(__bfloat162float(rounded)) >> 16);
  tf32[i] = tile::to_tf32(values[i]);
  packed[i] = tile::pack_bf16(values[i], values[count - 1 - i]);
}

// Every thread of the grid adds its block's index plus one, and offers its own index less `offset`.
__global__ void accumulate(int* sum_and_min, int offset) {
  atomicAdd(sum_and_min, static_cast<int>(blockIdx.x) + 1);
  atomicMin(sum_and_min + 1, static_cast<int>(threadIdx.x) - offset);
}

// Where each thread of the grid finds itself: six numbers.
__global__ void locate(unsigned* places) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  unsigned* place = places + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  place[0] = blockIdx.x;
  place[1] = blockIdx.y;
  place[2] = blockIdx.z;
  place[3] = threadIdx.x;
  place[4] = threadIdx.y;
  place[5] = threadIdx.z;
}

}  // namespace operations
