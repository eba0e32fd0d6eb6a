// What every measurement needs of the host: checked calls, memory, launches, timing.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>
#include <vector>

#include "ptx.cuh"
#include "report.h"

inline void check(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    throw Failure(std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}
#define CHECK(call) check((call), #call)

/// The device that is measured, and the one stream that everything runs on.
struct Device {
    std::string name;
    int major = 0, minor = 0, sm_count = 0, l2_bytes = 0;
    int shared_bytes_per_block = 0, shared_bytes_per_sm = 0;
    cudaStream_t stream = nullptr;

    static Device open() {
        Device device;
        int count = 0;
        CHECK(cudaGetDeviceCount(&count));
        if (count == 0) throw Failure("cudaGetDeviceCount: there is no CUDA device");
        CHECK(cudaSetDevice(0));
        cudaDeviceProp properties{};
        CHECK(cudaGetDeviceProperties(&properties, 0));
        device.name = properties.name;
        device.major = attribute(cudaDevAttrComputeCapabilityMajor);
        device.minor = attribute(cudaDevAttrComputeCapabilityMinor);
        device.sm_count = attribute(cudaDevAttrMultiProcessorCount);
        device.l2_bytes = attribute(cudaDevAttrL2CacheSize);
        device.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        device.shared_bytes_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
        CHECK(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking));
        return device;
    }

  private:
    static int attribute(cudaDeviceAttr which) {
        int value = 0;
        CHECK(cudaDeviceGetAttribute(&value, which, 0));
        return value;
    }
};

/// `count` elements of device memory.
template <typename T>
class Buffer {
  public:
    explicit Buffer(size_t count) : count_(count) { CHECK(cudaMalloc(&data_, count * sizeof(T))); }
    ~Buffer() { cudaFree(data_); }  // after an error there is nothing left to do about another
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* get() const { return data_; }
    size_t bytes() const { return count_ * sizeof(T); }

    void fill(int byte, cudaStream_t stream) { CHECK(cudaMemsetAsync(data_, byte, bytes(), stream)); }

    void upload(const std::vector<T>& from, cudaStream_t stream) {
        if (from.size() != count_) throw Failure("upload of another size");
        CHECK(cudaMemcpyAsync(data_, from.data(), bytes(), cudaMemcpyHostToDevice, stream));
        CHECK(cudaStreamSynchronize(stream));
    }

    std::vector<T> download(cudaStream_t stream) const {
        std::vector<T> result(count_);
        CHECK(cudaMemcpyAsync(result.data(), data_, bytes(), cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
        return result;
    }

  private:
    T* data_ = nullptr;
    size_t count_;
};

/// Shape of a launch.
struct Shape {
    int blocks = 1, threads = 1;
    size_t shared_bytes = 0;  // dynamic, per block
};

template <typename... Parameters, typename... Arguments>
void launch(const Shape& shape, cudaStream_t stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.blocks);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

/// More than 48 KiB of dynamic shared memory has to be asked for, kernel by kernel.
template <typename... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
    CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)));
}

/// Cycles for which a timed stream is held: about a millisecond, in which the host launches what is timed.
constexpr uint64_t HOLD_CYCLES = 2'000'000;

__global__ void hold_stream(uint64_t cycles) {
    const uint64_t begin = ptx::sm_cycles();
    while (ptx::sm_cycles() - begin < cycles) {
    }
}

/// Time by events, in microseconds.
class Stopwatch {
  public:
    explicit Stopwatch(cudaStream_t stream) : stream_(stream) {
        CHECK(cudaEventCreate(&begin_));
        const cudaError_t status = cudaEventCreate(&end_);
        if (status != cudaSuccess) {
            cudaEventDestroy(begin_);
            CHECK(status);
        }
    }
    ~Stopwatch() {
        cudaEventDestroy(begin_);
        cudaEventDestroy(end_);
    }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

    /// Device time of what `work` puts into the stream; returns when it is done. The stream is held until the host has
    /// put it there, or the time of launching would count.
    template <typename Work>
    double microseconds(Work work) {
        launch({1, 1}, stream_, hold_stream, HOLD_CYCLES);
        CHECK(cudaEventRecord(begin_, stream_));
        work();
        CHECK(cudaEventRecord(end_, stream_));
        CHECK(cudaEventSynchronize(end_));
        float milliseconds = 0;
        CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
        return 1e3 * milliseconds;
    }

  private:
    cudaStream_t stream_;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// Samples of the cost of one more round: (cost of `many` rounds - cost of `few`) / (many - few).
/// Launch, start and end drop out of the difference; the two are taken in turn, so that a drift hits both.
template <typename Cost>
std::vector<double> cost_of_one_more(int few, int many, int repetitions, Cost cost) {
    for (int warm_up = 0; warm_up < 2; ++warm_up) cost(few), cost(many);
    std::vector<double> samples;
    for (int i = 0; i < repetitions; ++i) {
        const double less = cost(few), more = cost(many);
        samples.push_back((more - less) / (many - few));
    }
    return samples;
}

/// Rates from costs: `amount` a round, over each cost. A pair of runs whose shorter one was held up gives no rate.
inline std::vector<double> rates(double amount, const std::vector<double>& costs) {
    std::vector<double> result;
    for (double cost : costs) {
        if (cost > 0) result.push_back(amount / cost);
    }
    if (4 * result.size() < 3 * costs.size()) throw Failure("more rounds often took no longer than fewer");
    return result;
}

/// Bytes in a microsecond to GB in a second.
constexpr double GB_PER_S = 1e-3;
