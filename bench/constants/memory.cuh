// How fast a multiprocessor reads its shared memory, and all of them L2 and device memory.
//
//   shared_memory_bytes_per_clk_sm   16-byte loads, 1024 threads, 64 KiB again and again, on every multiprocessor;
//                                    cycles by clock64, of the slowest block.
//   l2_bandwidth_gbs                 16-byte loads past L1 from 8 MiB, which stay in L2, by all multiprocessors.
//   l2_bandwidth_one_sm_gbs          the same by one block on an otherwise idle chip.
//   copy_bandwidth_gbs               device-to-device cudaMemcpyAsync of 1 GiB: bytes read plus bytes written.
#pragma once

#include "harness.cuh"
#include "ptx.cuh"
#include "reading.cuh"

/// What word `word` of a test pattern holds (an odd multiplier reaches every bit).
__host__ __device__ inline uint32_t memory_pattern(size_t word) { return static_cast<uint32_t>(word) * 2654435761u; }

// ---- shared memory

constexpr int SHARED_THREADS = 1024;
constexpr int SHARED_VECTORS = 64 * 1024 / sizeof(uint4);  // every chip has that

__global__ void __launch_bounds__(SHARED_THREADS) read_shared(int rounds, uint64_t* cycles, uint32_t* sums) {
    extern __shared__ uint4 held[];
    for (uint32_t v = threadIdx.x; v < SHARED_VECTORS; v += SHARED_THREADS) {
        held[v] = make_uint4(memory_pattern(4 * v), memory_pattern(4 * v + 1), memory_pattern(4 * v + 2),
                             memory_pattern(4 * v + 3));
    }
    const uint32_t base = ptx::shared_address(held);
    __syncthreads();
    const uint64_t begin = ptx::sm_cycles();
    uint32_t sum = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        sum += sum_of_vectors<SHARED_VECTORS, SHARED_THREADS>(
            [base](uint32_t v) { return ptx::load_shared(base + v * static_cast<uint32_t>(sizeof(uint4))); });
    }
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = ptx::sm_cycles() - begin;
    atomicAdd(&sums[blockIdx.x], sum);
}

inline Value shared_memory_bytes_per_clk_sm(const Device& device, int) {
    constexpr int FEW = 16, MANY = 272, REPETITIONS = 15;
    constexpr size_t BYTES = SHARED_VECTORS * sizeof(uint4);
    const Shape shape{device.sm_count, SHARED_THREADS, BYTES};
    allow_shared_bytes(read_shared, BYTES);
    Buffer<uint64_t> cycles(shape.blocks);
    Buffer<uint32_t> sums(shape.blocks);
    uint32_t sum_of_a_round = 0;
    for (uint32_t word = 0; word < 4 * SHARED_VECTORS; ++word) sum_of_a_round += memory_pattern(word);
    const std::vector<double> cycles_a_round = cost_of_one_more(FEW, MANY, REPETITIONS, [&](int rounds) {
        cycles.fill(0, device.stream);
        sums.fill(0, device.stream);
        launch(shape, device.stream, read_shared, rounds, cycles.get(), sums.get());
        for (uint32_t sum : sums.download(device.stream)) {
            if (sum != sum_of_a_round * static_cast<uint32_t>(rounds)) throw Failure("a block read a wrong sum");
        }
        const std::vector<uint64_t> taken = cycles.download(device.stream);
        return static_cast<double>(*std::max_element(taken.begin(), taken.end()));
    });
    return Value::median_of(rates(BYTES, cycles_a_round), 8, 600);
}

// ---- L2

constexpr int L2_THREADS = 1024, L2_BLOCKS_A_SM = 2;
constexpr int L2_SLICE_VECTORS = 64 * 1024 / sizeof(uint4);  // what a block reads in a round
constexpr int L2_SLICES = 128;                               // 8 MiB in all

/// Block b starts at slice 5 b and goes on by one a round, so that blocks are spread over the buffer.
__host__ __device__ inline uint32_t l2_slice(uint32_t block, uint32_t round) {
    return (5 * block + round) % L2_SLICES;
}

__global__ void __launch_bounds__(L2_THREADS, L2_BLOCKS_A_SM) read_l2(int rounds, const uint4* data, uint32_t* sums) {
    uint32_t sum = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        const uint4* slice = data + l2_slice(blockIdx.x, round) * L2_SLICE_VECTORS;
        sum += sum_of_vectors<L2_SLICE_VECTORS, L2_THREADS>([slice](uint32_t v) { return ptx::load_l2(slice + v); });
    }
    atomicAdd(&sums[blockIdx.x], sum);
}

inline Value l2_bandwidth(const Device& device, int blocks) {
    constexpr int FEW = 128, MANY = 640, REPETITIONS = 15;
    constexpr size_t WORDS = static_cast<size_t>(L2_SLICES) * L2_SLICE_VECTORS * 4;
    // Half of L2, as a chip may hold each line once in either half of it.
    if (WORDS * sizeof(uint32_t) > static_cast<size_t>(device.l2_bytes) / 2) {
        throw Unsupported("8 MiB do not fit into half of L2");
    }
    std::vector<uint32_t> pattern(WORDS), slice_sums(L2_SLICES, 0);
    for (size_t word = 0; word < WORDS; ++word) {
        pattern[word] = memory_pattern(word);
        slice_sums[word / (4 * L2_SLICE_VECTORS)] += pattern[word];
    }
    Buffer<uint32_t> data(WORDS), sums(blocks);
    data.upload(pattern, device.stream);
    Stopwatch stopwatch(device.stream);
    const Shape shape{blocks, L2_THREADS};
    const std::vector<double> costs = cost_of_one_more(FEW, MANY, REPETITIONS, [&](int rounds) {
        sums.fill(0, device.stream);
        const double taken = stopwatch.microseconds([&] {
            launch(shape, device.stream, read_l2, rounds, reinterpret_cast<const uint4*>(data.get()), sums.get());
        });
        const std::vector<uint32_t> found = sums.download(device.stream);
        for (int block = 0; block < blocks; ++block) {
            uint32_t expected = 0;
            for (int round = 0; round < rounds; ++round) expected += slice_sums[l2_slice(block, round)];
            if (found[block] != expected) throw Failure("block " + std::to_string(block) + " read a wrong sum");
        }
        return taken;
    });
    const double bytes_a_round = static_cast<double>(blocks) * L2_SLICE_VECTORS * sizeof(uint4);
    return Value::median_of(rates(bytes_a_round * GB_PER_S, costs), 1, 1e5);
}

inline Value l2_bandwidth_gbs(const Device& device, int) {
    return l2_bandwidth(device, device.sm_count * L2_BLOCKS_A_SM);
}

inline Value l2_bandwidth_one_sm_gbs(const Device& device, int) { return l2_bandwidth(device, 1); }

// ---- device memory

__global__ void write_pattern(uint32_t* data, size_t words) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step) {
        data[i] = memory_pattern(i);
    }
}

__global__ void count_mismatches(const uint32_t* data, size_t words, uint32_t* mismatches) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    uint32_t count = 0;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step) {
        count += data[i] != memory_pattern(i);
    }
    if (count != 0) atomicAdd(mismatches, count);
}

inline Value copy_bandwidth_gbs(const Device& device, int) {
    constexpr int COPIES = 4, REPETITIONS = 15, WARM_UP = 2;
    constexpr size_t WORDS = size_t{1} << 28;  // 1 GiB
    size_t free_bytes = 0, total_bytes = 0;
    CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    if (free_bytes < 3 * WORDS * sizeof(uint32_t)) throw Unsupported("less than 3 GiB of device memory are free");
    Buffer<uint32_t> source(WORDS), target(WORDS), mismatches(1);
    const Shape shape{8 * device.sm_count, 256};
    launch(shape, device.stream, write_pattern, source.get(), WORDS);
    target.fill(0xff, device.stream);
    mismatches.fill(0, device.stream);
    Stopwatch stopwatch(device.stream);
    std::vector<double> costs;
    for (int i = 0; i < WARM_UP + REPETITIONS; ++i) {
        const double taken = stopwatch.microseconds([&] {
            for (int n = 0; n < COPIES; ++n) {
                CHECK(cudaMemcpyAsync(target.get(), source.get(), source.bytes(), cudaMemcpyDeviceToDevice,
                                      device.stream));
            }
        });
        if (i >= WARM_UP) costs.push_back(taken / COPIES);
    }
    launch(shape, device.stream, count_mismatches, target.get(), WORDS, mismatches.get());
    if (mismatches.download(device.stream).front() != 0) throw Failure("the copy differs from its source");
    return Value::median_of(rates(2.0 * source.bytes() * GB_PER_S, costs), 10, 5e4);
}
