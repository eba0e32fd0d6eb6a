// Matrix products of one warp on Tensor Cores, and the loads of their operands.
//
// d += a b, with a of 16 rows, b of 8 columns and d of 16 x 8 numbers in float32. A lane holds a few elements of
// each, its fragment. All 32 lanes must take part. In the pictures g = lane / 4 and t = lane % 4.
//
//   d (16 x 8), both kinds             column 2t   2t+1
//                          row g              d0    d1
//                          row g + 8          d2    d3
#pragma once

#include "copy.cuh"
#include "platform.cuh"

namespace pcfast::tile {

// Row and column at which d[element] of a lane lies.
__host__ __device__ constexpr int accumulator_row(int lane, int element) { return lane / 4 + element / 2 * 8; }
__host__ __device__ constexpr int accumulator_column(int lane, int element) { return lane % 4 * 2 + element % 2; }

#ifndef __CUDACC__

constexpr uint32_t kTf32Bits = 0xFFFFE000;  // the bits of a float32 that a TF32 multiplier reads

struct MmaOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// The products are exact in float32; they are added up from first to last, and the sum is added to d. Tensor Cores
// add in an order of their own and cut off bits, so results agree within rounding, not bit for bit.
template <int kDepth>
PCFAST_UNSEEN_BY_TSAN void multiply_add(const float (&a)[kMmaM][kDepth], const float (&b)[kDepth][kMmaN],
                                        void* const* lanes) {
  float sums[kMmaM][kMmaN] = {};
  for (int row = 0; row < kMmaM; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kMmaN; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* d = static_cast<MmaOperands*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) d[i] += sums[accumulator_row(lane, i)][accumulator_column(lane, i)];
  }
}

// Returns a register's lower half (0) or upper half (1).
PCFAST_UNSEEN_BY_TSAN inline float bf16_half(uint32_t pair, int half) {
  return __uint_as_float(half == 0 ? pair << host::kBfloat16Shift : pair >> host::kBfloat16Shift << host::kBfloat16Shift);
}

PCFAST_UNSEEN_BY_TSAN inline void multiply_bf16(void* const* lanes) {
  float a[kMmaM][kBf16MmaK], b[kBf16MmaK][kMmaN];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto* own = static_cast<MmaOperands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * t + half;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][k + i / 2 * 8] = bf16_half(own->a[i], half);
      for (int i = 0; i < 2; ++i) b[k + i * 8][g] = bf16_half(own->b[i], half);
    }
  }
  multiply_add(a, b, lanes);
}

PCFAST_UNSEEN_BY_TSAN inline void multiply_tf32(void* const* lanes) {
  float a[kMmaM][kTf32MmaK], b[kTf32MmaK][kMmaN];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto* own = static_cast<MmaOperands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = __uint_as_float(own->a[i] & kTf32Bits);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = __uint_as_float(own->b[i] & kTf32Bits);
  }
  multiply_add(a, b, lanes);
}

#endif

// bfloat16, 16 deep. A register holds two neighbours along the depth k, the first in its lower half.
//
//   a (16 x 16)   k = 2t, 2t+1   2t+8, 2t+9         b (16 x 8)      column g
//   row g                   a0       a2             k = 2t, 2t+1          b0
//   row g + 8               a1       a3             k = 2t+8, 2t+9        b1
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2] PCFAST_AND_CALL_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  MmaOperands operands{d, a, b};
  host::warp_operation({"mma_bf16", call_site}, &operands, multiply_bf16);
#endif
}

// TF32, 8 deep: the bits of a float32, of which the lower 13 do not count. Round with to_tf32(); the multiplier cuts.
//
//   a (16 x 8)    k = t     t + 4                   b (8 x 8)       column g
//   row g            a0       a2                    k = t                 b0
//   row g + 8        a1       a3                    k = t + 4             b1
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2] PCFAST_AND_CALL_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  MmaOperands operands{d, a, b};
  host::warp_operation({"mma_tf32", call_site}, &operands, multiply_tf32);
#endif
}

// Rounds to the nearest number with 10 stored bits of fraction, ties away from zero; the other 13 bits are zero. Infinities
// and NaNs only lose those bits, and a NaN with no others becomes an infinity.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  constexpr uint32_t kHalfUlp = (~kTf32Bits + 1) / 2;
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & host::kFloatSignless) < host::kFloatInfinity;
  return (finite ? bits + kHalfUlp : bits) & kTf32Bits;
#endif
}

// Rounds two numbers to bfloat16 in one register: to nearest, ties to even.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << host::kBfloat16Shift;
#endif
}

#ifndef __CUDACC__

constexpr int kMatrixRows = 8;
constexpr int kMatrixColumns = 8;
constexpr int kMatrixRowBytes = 16;

struct LoadOperands {
  uint16_t row[kMatrixColumns];  // the row whose address this lane gave
  uint32_t* registers;
};

PCFAST_UNSEEN_BY_TSAN inline uint32_t matrix_element(void* const* lanes, int matrix, int row, int column) {
  return static_cast<LoadOperands*>(lanes[matrix * kMatrixRows + row])->row[column];
}

template <int kCount, bool kTransposed>
PCFAST_UNSEEN_BY_TSAN void distribute_rows(void* const* lanes) {
  for (int matrix = 0; matrix < kCount; ++matrix) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, first = lane % 4 * 2, second = first + 1;
      const uint32_t low = matrix_element(lanes, matrix, kTransposed ? first : g, kTransposed ? g : first);
      const uint32_t high = matrix_element(lanes, matrix, kTransposed ? second : g, kTransposed ? g : second);
      static_cast<LoadOperands*>(lanes[lane])->registers[matrix] = low | high << host::kBfloat16Shift;
    }
  }
}

#endif

// Loads kCount matrices of 8 x 8 16-bit numbers from shared memory. Lane l gives the address of row l % 8 of matrix
// l / 8, 16 bytes at a multiple of 16; the addresses of lanes past the last matrix are ignored. r[m] of a lane is,
// of matrix m, with the lower element in the lower half:
//
//   as stored:   row g, columns 2t and 2t+1        the layout of a, and of b stored with k along its rows
//   kTransposed: rows 2t and 2t+1, column g        of b stored with k down its columns
template <int kCount, bool kTransposed>
__device__ __forceinline__ void load_matrix(uint32_t (&r)[kCount], const void* shared_row PCFAST_AND_CALL_SITE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const uint32_t address = shared_address(shared_row);
  if constexpr (kCount == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  const host::CallSite site{"load_matrix", call_site};
  LoadOperands operands{{}, r};
  if (host::this_thread().lane < kCount * kMatrixRows) {
    host::require_aligned(shared_row, kMatrixRowBytes, site);
    host::require_shared(shared_row, kMatrixRowBytes, site);
    // Each lane reads its own row, so that ThreadSanitizer sees who read what.
    std::memcpy(operands.row, shared_row, kMatrixRowBytes);
  }
  host::warp_operation(site, &operands, distribute_rows<kCount, kTransposed>);
#endif
}

}  // namespace pcfast::tile
