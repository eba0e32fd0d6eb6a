// The inner loop of the bandwidth measurements: read vectors of 16 bytes and add them up.
//
// The sum is what keeps the loop: the host knows what it must be. Additions modulo 2^32 come out the same in any order.
#pragma once

#include <cstdint>

/// Loads that a thread has under way before it uses the first.
constexpr int LOADS_IN_FLIGHT = 4;

/// This thread's part of the sum of all words of `VECTORS` vectors, which a block of `THREADS` threads reads; `load(v)`
/// reads vector v. The loop round this must not be unrolled: ptxas would mix rounds and hold fewer loads at once.
template <int VECTORS, int THREADS, typename Load>
__device__ __forceinline__ uint32_t sum_of_vectors(Load load) {
    constexpr int VECTORS_A_STEP = THREADS * LOADS_IN_FLIGHT;
    static_assert(VECTORS % VECTORS_A_STEP == 0, "the vectors are a whole number of unrolled steps");
    uint32_t sum = 0;
    for (int step = 0; step < VECTORS / VECTORS_A_STEP; ++step) {
        const uint32_t first = step * VECTORS_A_STEP + threadIdx.x;
        uint4 loaded[LOADS_IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < LOADS_IN_FLIGHT; ++i) loaded[i] = load(first + i * THREADS);
#pragma unroll
        for (int i = 0; i < LOADS_IN_FLIGHT; ++i) sum += loaded[i].x + loaded[i].y + loaded[i].z + loaded[i].w;
    }
    return sum;
}
