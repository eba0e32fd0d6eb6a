// Kernels with one mistake each, of the kinds that a launch on the host reports without a sanitizer.
#include "calls.h"
#include "tile/copy.cuh"
#include "tile/mma.cuh"
#include "tile/warp_reduce.cuh"

namespace {

namespace tile = pcfast::tile;

constexpr unsigned kThreads = 64;
constexpr std::size_t kSharedBytes = 1024;

__global__ void none(float* out, const float*) {
  PCFAST_SHARED_MEMORY(shared);
  auto* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void barrier_in_a_branch(float*, const float*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers(float*, const float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void returned_early(float*, const float*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void more_barriers_in_one_warp(float*, const float*) {
  for (int i = 0; i <= tile::warp_index(); ++i) __syncthreads();
}

__global__ void shuffle_in_a_branch(float* out, const float*) {
  if (tile::lane_index() < 16) out[threadIdx.x] = tile::warp_sum(1.0f);
}

__global__ void wait_for_different_things(float* out, const float*) {
  if (tile::warp_index() == 0) {
    __syncthreads();
  } else if (tile::lane_index() == 0) {
    __syncwarp();
  } else {
    out[threadIdx.x] = 0.0f;
  }
}

__global__ void misaligned_source(float*, const float* in) {
  PCFAST_SHARED_MEMORY(shared);
  tile::copy_async<16>(shared + 16 * threadIdx.x, in + 1);
}

__global__ void misaligned_target(float*, const float* in) {
  PCFAST_SHARED_MEMORY(shared);
  tile::copy_async<8>(shared + 4, in);
}

__global__ void misaligned_row(float*, const float*) {
  PCFAST_SHARED_MEMORY(shared);
  uint32_t r[1];
  tile::load_matrix<1, false>(r, shared + 8);
}

__global__ void copy_past_the_end(float*, const float* in) {
  PCFAST_SHARED_MEMORY(shared);
  tile::copy_async<16>(shared + 16 * (threadIdx.x + 1), in);
}

__global__ void row_outside(float* out, const float*) {
  uint32_t r[1];
  tile::load_matrix<1, false>(r, out);
}

__global__ void no_wait(float* out, const float* in) {
  PCFAST_SHARED_MEMORY(shared);
  auto* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = 1.0f;
  tile::copy_async<4>(values + threadIdx.x, in + threadIdx.x);
  tile::copy_commit();
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void no_commit(float* out, const float* in) {
  PCFAST_SHARED_MEMORY(shared);
  auto* values = reinterpret_cast<float*>(shared);
  tile::copy_async<4>(values + threadIdx.x, in + threadIdx.x);
  tile::copy_wait<0>();
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void source_changes(float* out, const float*) {
  PCFAST_SHARED_MEMORY(shared);
  out[threadIdx.x] = 0.0f;
  tile::copy_async<4>(shared + 4 * threadIdx.x, out + threadIdx.x);
  out[threadIdx.x] = 1.0f;
  tile::copy_commit();
  tile::copy_wait<0>();
}

__global__ void never_written(float* out, const float*) {
  PCFAST_SHARED_MEMORY(shared);
  out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
}

struct Case {
  const char* name;
  void (*kernel)(float*, const float*);
  unsigned threads = kThreads;
};

constexpr unsigned kBrokenWarp = 40;

const Case kCases[] = {
    {"none", none},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"two_barriers", two_barriers},
    {"returned_early", returned_early},
    {"more_barriers_in_one_warp", more_barriers_in_one_warp},
    {"shuffle_in_a_branch", shuffle_in_a_branch},
    {"shuffle_in_a_broken_warp", shuffle_in_a_branch, kBrokenWarp},
    {"wait_for_different_things", wait_for_different_things},
    {"misaligned_source", misaligned_source},
    {"misaligned_target", misaligned_target},
    {"misaligned_row", misaligned_row},
    {"copy_past_the_end", copy_past_the_end},
    {"row_outside", row_outside},
    {"no_wait", no_wait},
    {"no_commit", no_commit},
    {"source_changes", source_changes},
    {"never_written", never_written},
};

}  // namespace

// `in` is a multiple of 16 bytes; both arrays have 64 elements.
extern "C" int run(const char* name, float* out, const float* in) {
  for (const Case& one : kCases) {
    if (std::string(name) != one.name) continue;
    return status_of(
        [&] { return tile::launch(one.kernel, dim3(2), dim3(one.threads), kSharedBytes, nullptr, out, in); });
  }
  return -1;
}
