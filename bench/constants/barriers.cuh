// What it costs to bring blocks together, and to hand something from one to the next.
//
//   grid_barrier_us          cooperative groups' grid.sync(): one block of 256 threads on every multiprocessor.
//   cluster_barrier_us       barrier.cluster (release, acquire), by cluster size: as many clusters as are resident with
//                            200 KiB and 256 threads a block, all of them at it at once.
//   cluster_barrier_relaxed_us
//                            the same without the release, which on sm_90 and sm_100 is a fence of the whole chip
//                            (MEMBAR.ALL.GPU in SASS): it holds the blocks together, but shows none of them what
//                            another wrote.
//   neighbour_flag_hop_us    a token goes round a ring of blocks, one on every multiprocessor: each block waits for its
//                            own flag (ld.acquire.gpu) and then sets the next block's (st.release.gpu). Time of a lap
//                            over the number of blocks. It is the flag alone: a real hand-over adds a __syncthreads()
//                            on both sides and the reading of the data.
//
// All of them: (time of many rounds - time of few rounds) / rounds between, kernel times by events.
#pragma once

#include <cooperative_groups.h>

#include "clusters.cuh"
#include "harness.cuh"
#include "ptx.cuh"
#include "waiting.cuh"

constexpr int BARRIER_THREADS = 256;

/// Cost of a round in `kernel(rounds, done)`, which counts what each block did: done[block] = rounds.
template <typename Kernel>
std::vector<double> cost_of_a_round(const Device& device, const Shape& shape, Kernel kernel, int few, int many,
                                    int repetitions) {
    Buffer<uint32_t> done(shape.blocks);
    Stopwatch stopwatch(device.stream);
    return cost_of_one_more(few, many, repetitions, [&](int rounds) {
        done.fill(0, device.stream);
        const double taken =
            stopwatch.microseconds([&] { launch(shape, device.stream, kernel, rounds, done.get()); });
        for (uint32_t count : done.download(device.stream)) {
            if (count != static_cast<uint32_t>(rounds)) throw Failure("a block did not do all its rounds");
        }
        return taken;
    });
}

// ---- the whole grid

__global__ void __launch_bounds__(BARRIER_THREADS) grid_barriers(int rounds, uint32_t* done) {
    cooperative_groups::grid_group grid = cooperative_groups::this_grid();
    uint32_t count = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        grid.sync();
        ++count;
    }
    if (threadIdx.x == 0) done[blockIdx.x] = count;
}

/// One block on every multiprocessor, made sure of by all the shared memory that a block can have.
template <typename... Parameters>
Shape one_block_a_multiprocessor(const Device& device, void (*kernel)(Parameters...), int threads) {
    if (!device.cooperative) throw Unsupported("no cooperative launches");
    const size_t shared_bytes = device.shared_bytes_per_block;
    allow_shared_bytes(kernel, shared_bytes);
    return {device.sm_count, threads, shared_bytes, 0, true};
}

inline Value grid_barrier_us(const Device& device, int) {
    constexpr int FEW = 100, MANY = 1100, REPETITIONS = 20;
    const Shape shape = one_block_a_multiprocessor(device, grid_barriers, BARRIER_THREADS);
    return Value::median_of(cost_of_a_round(device, shape, grid_barriers, FEW, MANY, REPETITIONS), 0.05, 100);
}

// ---- a cluster

template <bool RELAXED>
__global__ void __launch_bounds__(BARRIER_THREADS) cluster_barriers(int rounds, uint32_t* done) {
    uint32_t count = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        if constexpr (RELAXED) {
            ptx::cluster_barrier_relaxed();
        } else {
            ptx::cluster_barrier();
        }
        ++count;
    }
    if (threadIdx.x == 0) done[blockIdx.x] = count;
}

template <bool RELAXED>
Value cluster_barrier(const Device& device, int cluster_size) {
    constexpr int FEW = 500, MANY = 5500, REPETITIONS = 15;
    const auto kernel = cluster_barriers<RELAXED>;
    const Shape shape =
        filled_with_clusters(device, kernel, {cluster_size, BARRIER_THREADS, LARGE_BLOCK_BYTES, cluster_size});
    return Value::median_of(cost_of_a_round(device, shape, kernel, FEW, MANY, REPETITIONS), 0.01, 50);
}

inline Value cluster_barrier_us(const Device& device, int cluster_size) {
    return cluster_barrier<false>(device, cluster_size);
}

inline Value cluster_barrier_relaxed_us(const Device& device, int cluster_size) {
    return cluster_barrier<true>(device, cluster_size);
}

// ---- from one block to the next

constexpr int FLAG_STRIDE = 64;  // words: 256 bytes, so that no two flags share a cache line

/// `flags[block * FLAG_STRIDE]` is the lap for which `block` holds the token; all are 0 at the start.
__global__ void pass_token_round(int laps, uint32_t* flags, Stall* stall) {
    if (threadIdx.x != 0) return;
    const uint32_t block = blockIdx.x, blocks = gridDim.x;
    const uint32_t previous = (block + blocks - 1) % blocks;
    const uint32_t* mine = flags + block * FLAG_STRIDE;
    uint32_t* next = flags + (block + 1) % blocks * FLAG_STRIDE;
    for (uint32_t lap = 1; lap <= static_cast<uint32_t>(laps); ++lap) {
        // block 0 starts a lap when the one before it has come home
        if (!wait_for(mine, block == 0 ? lap - 1 : lap, previous, stall)) return;
        ptx::store_release(next, lap);
    }
    if (block == 0) wait_for(mine, laps, previous, stall);
}

inline Value neighbour_flag_hop_us(const Device& device, int) {
    constexpr int FEW = 2, MANY = 22, REPETITIONS = 20;
    if (device.sm_count < 2) throw Unsupported("one multiprocessor has no neighbour");
    constexpr int ONE_WARP = 32;
    // the cooperative launch makes sure that all blocks of the ring are resident
    const Shape shape = one_block_a_multiprocessor(device, pass_token_round, ONE_WARP);
    Buffer<uint32_t> flags(static_cast<size_t>(shape.blocks) * FLAG_STRIDE);
    Buffer<Stall> stall(1);
    Stopwatch stopwatch(device.stream);
    std::vector<double> samples = cost_of_one_more(FEW, MANY, REPETITIONS, [&](int laps) {
        flags.fill(0, device.stream);
        stall.fill(0, device.stream);
        const double taken = stopwatch.microseconds(
            [&] { launch(shape, device.stream, pass_token_round, laps, flags.get(), stall.get()); });
        check_no_stall(stall, device.stream, "the token from block");
        if (flags.download(device.stream).front() != static_cast<uint32_t>(laps)) {
            throw Failure("the token did not come home");
        }
        return taken;
    });
    for (double& lap : samples) lap /= shape.blocks;
    return Value::median_of(samples, 0.05, 50);
}
