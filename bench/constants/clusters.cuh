// Thread-block clusters: how many fit, and how fast their blocks read each other's shared memory. By cluster size.
//
//   resident_clusters_200_kib, resident_clusters_1_kib
//       clusters that run at the same time, with 200 KiB and 1 KiB of dynamic shared memory a block (256 threads). The
//       occupancy API's number, put to the test: that many clusters are launched, and every block waits until all of
//       them have arrived. A kernel whose clusters wait for each other deadlocks on one cluster more.
//   dsmem_bandwidth_gbs
//       bytes that all blocks of all resident clusters together read from the shared memory of the next block in
//       their cluster, in 16-byte loads: 1024 threads a block, 128 KiB read again and again.
#pragma once

#include "harness.cuh"
#include "ptx.cuh"
#include "reading.cuh"
#include "waiting.cuh"

constexpr size_t KIB = 1024;
constexpr size_t LARGE_BLOCK_BYTES = 200 * KIB;  // one block a multiprocessor, with room for its weights
constexpr int PORTABLE_CLUSTER_SIZE = 8;         // larger ones have to be asked for, and not every chip has them

/// How many clusters of `shape` run at the same time, as the occupancy API says. Sets what `kernel` needs for it.
template <typename... Parameters>
int max_resident_clusters(const Device& device, void (*kernel)(Parameters...), const Shape& shape) {
    if (!device.clusters) throw Unsupported("no thread-block clusters before compute capability 9.0");
    if (shape.shared_bytes > static_cast<size_t>(device.shared_bytes_per_block)) {
        throw Unsupported("a block gets " + std::to_string(device.shared_bytes_per_block) +
                          " bytes of shared memory at most");
    }
    allow_shared_bytes(kernel, shape.shared_bytes);
    const void* function = reinterpret_cast<const void*>(kernel);
    const bool portable = shape.cluster_size <= PORTABLE_CLUSTER_SIZE;
    cudaError_t status = portable ? cudaSuccess
                                  : cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    int clusters = 0;
    if (status == cudaSuccess) {
        Shape one = shape;
        one.blocks = shape.cluster_size;
        const LaunchConfig config(one, device.stream);
        status = cudaOccupancyMaxActiveClusters(&clusters, function, config.get());
    }
    if (status == cudaErrorInvalidClusterSize || (status != cudaSuccess && !portable)) {
        cudaGetLastError();
        throw Unsupported("no clusters of " + std::to_string(shape.cluster_size) + " blocks: " +
                          cudaGetErrorName(status));
    }
    check(status, "cudaOccupancyMaxActiveClusters");
    return clusters;
}

/// `shape` with as many blocks as are resident at once; Unsupported where not even one cluster is.
template <typename... Parameters>
Shape filled_with_clusters(const Device& device, void (*kernel)(Parameters...), Shape shape) {
    const int clusters = max_resident_clusters(device, kernel, shape);
    if (clusters < 1) {
        throw Unsupported("not one cluster of " + std::to_string(shape.cluster_size) + " blocks with " +
                          std::to_string(shape.shared_bytes) + " bytes each is resident");
    }
    shape.blocks = clusters * shape.cluster_size;
    return shape;
}

// ---- how many are resident

__global__ void arrive_and_wait_for_all(uint32_t* arrived, Stall* stall) {
    if (threadIdx.x != 0) return;
    atomicAdd(arrived, 1u);
    wait_for(arrived, gridDim.x, gridDim.x, stall);
}

inline Value resident_clusters(const Device& device, int cluster_size, size_t shared_bytes) {
    constexpr int THREADS = 256;
    const Shape one{cluster_size, THREADS, shared_bytes, cluster_size};
    int clusters = 0;
    try {
        clusters = max_resident_clusters(device, arrive_and_wait_for_all, one);
    } catch (const Unsupported&) {
        // none: that is a result too, and the one a planner needs
    }
    if (clusters == 0) return Value::exact(0);
    Shape all = one;
    all.blocks = clusters * cluster_size;
    Buffer<uint32_t> arrived(1);
    Buffer<Stall> stall(1);
    arrived.fill(0, device.stream);
    stall.fill(0, device.stream);
    launch(all, device.stream, arrive_and_wait_for_all, arrived.get(), stall.get());
    check_no_stall(stall, device.stream, "the number of arrived blocks, of all");
    if (arrived.download(device.stream).front() != static_cast<uint32_t>(all.blocks)) {
        throw Failure("not every block of the grid ran");
    }
    return Value::exact(clusters);
}

inline Value resident_clusters_200_kib(const Device& device, int cluster_size) {
    return resident_clusters(device, cluster_size, LARGE_BLOCK_BYTES);
}

inline Value resident_clusters_1_kib(const Device& device, int cluster_size) {
    return resident_clusters(device, cluster_size, KIB);
}

// ---- how fast they read each other

constexpr int DSMEM_THREADS = 1024;
constexpr int DSMEM_VECTORS = 128 * KIB / sizeof(uint4);
static_assert(DSMEM_VECTORS * sizeof(uint4) <= LARGE_BLOCK_BYTES, "the block has room for what it holds");

/// What a block of rank `rank` holds in word `word`.
__host__ __device__ inline uint32_t dsmem_pattern(uint32_t rank, uint32_t word) { return rank * 65599u + word; }

__global__ void __launch_bounds__(DSMEM_THREADS) read_neighbour(int rounds, uint32_t cluster_size, uint32_t* sums) {
    extern __shared__ uint4 held[];  // DSMEM_VECTORS of it are used
    const uint32_t rank = ptx::cluster_rank();
    for (uint32_t v = threadIdx.x; v < DSMEM_VECTORS; v += DSMEM_THREADS) {
        held[v] = make_uint4(dsmem_pattern(rank, 4 * v), dsmem_pattern(rank, 4 * v + 1),
                             dsmem_pattern(rank, 4 * v + 2), dsmem_pattern(rank, 4 * v + 3));
    }
    ptx::cluster_barrier();
    const uint32_t next = ptx::address_in_cluster(ptx::shared_address(held), (rank + 1) % cluster_size);
    uint32_t sum = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        sum += sum_of_vectors<DSMEM_VECTORS, DSMEM_THREADS>([next](uint32_t v) {
            return ptx::load_cluster(next + v * static_cast<uint32_t>(sizeof(uint4)));
        });
    }
    atomicAdd(&sums[blockIdx.x], sum);
    ptx::cluster_barrier();  // the neighbour may still be reading here
}

inline Value dsmem_bandwidth_gbs(const Device& device, int cluster_size) {
    constexpr int FEW = 8, MANY = 208, REPETITIONS = 15;
    const Shape shape = filled_with_clusters(device, read_neighbour,
                                             {cluster_size, DSMEM_THREADS, LARGE_BLOCK_BYTES, cluster_size});
    std::vector<uint32_t> held_by_rank(cluster_size, 0);
    for (int rank = 0; rank < cluster_size; ++rank) {
        for (uint32_t word = 0; word < 4 * DSMEM_VECTORS; ++word) held_by_rank[rank] += dsmem_pattern(rank, word);
    }
    Buffer<uint32_t> sums(shape.blocks);
    Stopwatch stopwatch(device.stream);
    const auto cost = [&](int rounds) {
        sums.fill(0, device.stream);
        const double taken = stopwatch.microseconds([&] {
            launch(shape, device.stream, read_neighbour, rounds, static_cast<uint32_t>(cluster_size), sums.get());
        });
        const std::vector<uint32_t> found = sums.download(device.stream);
        for (int block = 0; block < shape.blocks; ++block) {
            // blocks of a cluster have consecutive indices, and their rank is the place in it
            const int next = (block % cluster_size + 1) % cluster_size;
            const uint32_t expected = held_by_rank[next] * static_cast<uint32_t>(rounds);
            if (found[block] != expected) throw Failure("block " + std::to_string(block) + " read a wrong sum");
        }
        return taken;
    };
    const double bytes_a_round = static_cast<double>(shape.blocks) * DSMEM_VECTORS * sizeof(uint4);
    return Value::median_of(rates(bytes_a_round * GB_PER_S, cost_of_one_more(FEW, MANY, REPETITIONS, cost)), 50, 1e5);
}
