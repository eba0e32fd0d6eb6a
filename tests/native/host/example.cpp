// A small relaxation, x <- x + rate (tanh(x) W - x), against a plain loop. The first argument plants a fault.
//
// Under ThreadSanitizer and AddressSanitizer this program must be silent without a fault and report each with one.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "calls.h"
#include "tile/copy.cuh"
#include "tile/mma.cuh"
#include "tile/warp_reduce.cuh"

namespace {

namespace tile = pcfast::tile;
using bf16 = __nv_bfloat16;

enum class Fault {
  kNone,
  kNoBarrier,        // between the writes of the activities and their reads
  kNoLastBarrier,    // between the reads of an iteration and the writes of the next
  kShuffleBarrier,   // a shuffle in place of a warp's barrier
  kNoWait,           // for the copy of the weights
  kNotAtomic,        // the sum over the blocks
  kNoBoundsCheck,    // on the rows of x
  kPastShared,       // one row more than the last array has
  kIntoGap,          // one row more than the first array has
  kBranch,           // a barrier that one warp does not reach
  kMisaligned,       // copy
};

struct Name {
  const char* name;
  Fault fault;
};

const Name kNames[] = {
    {"none", Fault::kNone},
    {"no_barrier", Fault::kNoBarrier},
    {"no_last_barrier", Fault::kNoLastBarrier},
    {"shuffle_barrier", Fault::kShuffleBarrier},
    {"no_wait", Fault::kNoWait},
    {"not_atomic", Fault::kNotAtomic},
    {"no_bounds_check", Fault::kNoBoundsCheck},
    {"past_shared", Fault::kPastShared},
    {"into_gap", Fault::kIntoGap},
    {"branch", Fault::kBranch},
    {"misaligned", Fault::kMisaligned},
};

constexpr int kWidth = 32;
constexpr int kRows = 16;  // of a block
constexpr int kWarps = 2;
constexpr int kThreads = kWarps * tile::kWarpSize;
constexpr int kStride = kWidth + 8;  // of a row in shared memory: rows of one load then lie in different banks
constexpr int kTiles = kWidth / kWarps / 8;  // of 8 columns, in a warp's part
constexpr int kDepth = 16;                   // of one product
constexpr int kCopied = 8;                   // weights in one copy

constexpr int kGapBytes = 64;
constexpr int kWeightBytes = kWidth * kStride * static_cast<int>(sizeof(bf16));
constexpr int kHandledBytes = kThreads * static_cast<int>(sizeof(int));
constexpr int kActivityBytes = kRows * kStride * static_cast<int>(sizeof(bf16));
constexpr int kSharedBytes = kWeightBytes + kGapBytes + kHandledBytes + kActivityBytes;

__global__ void __launch_bounds__(kThreads)
    relax(float* x, const bf16* weights, int* handled, int rows, int iterations, float rate, Fault fault) {
  PCFAST_SHARED_MEMORY(shared);
  auto* shared_weights = reinterpret_cast<bf16*>(shared);
  auto* shared_handled = reinterpret_cast<int*>(shared + kWeightBytes + kGapBytes);
  auto* activities = reinterpret_cast<bf16*>(shared + kWeightBytes + kGapBytes + kHandledBytes);
  tile::poison_shared(shared + kWeightBytes, kGapBytes);

  const int thread = static_cast<int>(threadIdx.x), lane = tile::lane_index();
  const int first_row = static_cast<int>(blockIdx.x) * kRows, first_column = tile::warp_index() * kTiles * 8;

  float state[kTiles][4];
  for (int n = 0; n < kTiles; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + tile::accumulator_row(lane, i);
      const int column = first_column + 8 * n + tile::accumulator_column(lane, i);
      state[n][i] = row < rows ? x[row * kWidth + column] : 0.0f;
    }
  }

  for (int iteration = 0; iteration < iterations; ++iteration) {
    for (int i = thread; i < kWidth * kWidth / kCopied; i += kThreads) {
      const int row = i * kCopied / kWidth, column = i * kCopied % kWidth;
      const int shift = fault == Fault::kMisaligned ? 1 : 0;
      tile::copy_async<16>(shared_weights + row * kStride + column,  // copies the weights
                           weights + row * kWidth + column + shift);
    }
    tile::copy_commit();
    for (int n = 0; n < kTiles; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int row = tile::accumulator_row(lane, i);
        const int column = first_column + 8 * n + tile::accumulator_column(lane, i);
        activities[row * kStride + column] = __float2bfloat16_rn(tanhf(state[n][i]));  // writes activities
      }
    }
    if (fault == Fault::kPastShared) activities[kRows * kStride + thread] = __float2bfloat16_rn(0.0f);  // past the end
    if (fault == Fault::kIntoGap) shared_weights[kWidth * kStride + thread % 8] = __float2bfloat16_rn(0.0f);  // in the gap
    if (fault != Fault::kNoWait) tile::copy_wait<0>();
    if (fault == Fault::kBranch) {
      if (tile::warp_index() == 0) __syncthreads();  // in a branch
    } else if (fault != Fault::kNoBarrier) {
      __syncthreads();
    }
    float product[kTiles][4] = {};
    for (int k = 0; k < kWidth; k += kDepth) {
      uint32_t a[4];
      tile::load_matrix<4, false>(a, activities + lane % 16 * kStride + k + lane / 16 * 8);  // reads activities
      for (int n = 0; n < kTiles; ++n) {
        uint32_t b[2];
        tile::load_matrix<2, true>(b, shared_weights + (k + lane % 16) * kStride + first_column + 8 * n);
        tile::mma_bf16(product[n], a, b);
      }
    }
    for (int n = 0; n < kTiles; ++n) {
      for (int i = 0; i < 4; ++i) state[n][i] += rate * (product[n][i] - state[n][i]);
    }
    if (fault != Fault::kNoLastBarrier) __syncthreads();
  }

  int own = 0;
  for (int n = 0; n < kTiles; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + tile::accumulator_row(lane, i);
      const int column = first_column + 8 * n + tile::accumulator_column(lane, i);
      if (row >= rows && fault != Fault::kNoBoundsCheck) continue;
      x[row * kWidth + column] = state[n][i];  // writes x
      ++own;
    }
  }
  shared_handled[thread] = own;  // hands over a count
  if (fault == Fault::kShuffleBarrier) {
    __shfl_xor_sync(tile::kFullMask, own, 1);
  } else {
    __syncwarp();
  }
  const int sum = tile::warp_sum(shared_handled[thread ^ 1]);  // takes over a count
  if (lane == 0) {
    if (fault == Fault::kNotAtomic) {
      *handled += sum;  // adds up
    } else {
      atomicAdd(handled, sum);
    }
  }
}

// x row by row, in double but for the roundings that the kernel makes too.
void relax_plainly(std::vector<float>& x, const std::vector<bf16>& weights, int rows, int iterations, float rate) {
  for (int row = 0; row < rows; ++row) {
    float* state = x.data() + row * kWidth;
    for (int iteration = 0; iteration < iterations; ++iteration) {
      double product[kWidth] = {};
      for (int k = 0; k < kWidth; ++k) {
        const double activity = __bfloat162float(__float2bfloat16_rn(tanhf(state[k])));
        for (int n = 0; n < kWidth; ++n) product[n] += activity * __bfloat162float(weights[k * kWidth + n]);
      }
      for (int n = 0; n < kWidth; ++n) state[n] += rate * (static_cast<float>(product[n]) - state[n]);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  Fault fault = Fault::kNone;
  for (const Name& one : kNames) {
    if (count > 1 && std::strcmp(arguments[1], one.name) == 0) fault = one.fault;
  }
  const bool many_blocks = count > 1 && std::strcmp(arguments[1], "many_blocks") == 0;
  const int rows = (many_blocks ? 130 : 2) * kRows + 5;
  constexpr int kIterations = 6;
  constexpr float kRate = 0.25f, kTolerance = 5e-3f;

  std::vector<float> start(static_cast<std::size_t>(rows * kWidth));
  std::vector<bf16> weights(kWidth * kWidth + kCopied);
  for (std::size_t i = 0; i < start.size(); ++i) start[i] = sinf(static_cast<float>(i * i % 997));
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = __float2bfloat16_rn(0.3f * cosf(static_cast<float>(i * 7)));

  std::vector<float> expected = start, x = start;
  relax_plainly(expected, weights, rows, kIterations, kRate);
  int handled = 0;
  const int status = status_of([&] {
    return tile::launch(relax, dim3(static_cast<unsigned>((rows + kRows - 1) / kRows)), dim3(kThreads), kSharedBytes, nullptr, x.data(),
                        weights.data(), &handled, rows, kIterations, kRate, fault);
  });
  if (status != 0) {
    std::fprintf(stderr, "%s\n", message());
    return status;
  }
  float error = 0.0f;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float difference = std::fabs(x[i] - expected[i]);
    if (!(difference <= error)) error = difference;
  }
  std::printf("error %g, handled %d\n", static_cast<double>(error), handled);
  return error <= kTolerance && handled == rows * kWidth ? 0 : 1;
}
