// How fast an SM reads its shared memory, and the GPU copies device memory.
//
//   shared_memory_bytes_per_clk_sm   16-byte loads, 1024 threads, 64 KiB again and again, on every SM;
//                                    cycles by clock64, of the slowest block.
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

inline Value shared_memory_bytes_per_clk_sm(const Device& device) {
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

inline Value copy_bandwidth_gbs(const Device& device) {
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
