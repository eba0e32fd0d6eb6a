// Waits between blocks that end: a flag that never comes is given up after a while, and the wait says who waited for
// whom. A kernel that waits so cannot hang, whatever the scheduler does with its blocks.
#pragma once

#include "harness.cuh"
#include "ptx.cuh"

/// Cycles after which a wait is given up: about a second.
constexpr uint64_t PATIENCE_CYCLES = 2'000'000'000;

/// The first wait that was given up.
struct Stall {
    uint32_t happened;  // 0: none yet
    uint32_t waiting_block, awaited_block, expected, seen;
};

/// Wait until `*flag` has reached `expected` (it only grows). False, with `stall` written, when it does not.
__device__ inline bool wait_for(const uint32_t* flag, uint32_t expected, uint32_t awaited_block, Stall* stall) {
    const uint64_t begin = ptx::sm_cycles();
    uint32_t seen = ptx::load_acquire(flag);
    while (seen < expected) {
        if (ptx::sm_cycles() - begin > PATIENCE_CYCLES) {
            if (atomicCAS(&stall->happened, 0u, 1u) == 0u) {
                stall->waiting_block = blockIdx.x;
                stall->awaited_block = awaited_block;
                stall->expected = expected;
                stall->seen = seen;
            }
            return false;
        }
        seen = ptx::load_acquire(flag);
    }
    return true;
}

/// Host side: throws when a wait of the kernel that just ran was given up.
inline void check_no_stall(const Buffer<Stall>& buffer, cudaStream_t stream, const std::string& who_is_awaited) {
    const Stall stall = buffer.download(stream).front();
    if (stall.happened == 0) return;
    throw Failure("block " + std::to_string(stall.waiting_block) + " waited a second for " + who_is_awaited + " (" +
                  std::to_string(stall.awaited_block) + ") to reach " + std::to_string(stall.expected) +
                  " and saw " + std::to_string(stall.seen));
}
