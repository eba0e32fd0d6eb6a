// What starting a kernel costs.
//
//   graph_node_gap_us   a chain of n empty kernels, each dependent on the one before, replayed from a CUDA graph:
//                       (time of 520 nodes - time of 20 nodes) / 500. An empty kernel's own run is part of it.
//   stream_launch_us    host time of putting one empty kernel into an idle stream; 256 of them fit into its queue.
//
// The kernel has one block of 128 threads on every multiprocessor, as a stage of a relaxation would.
#pragma once

#include <chrono>

#include "harness.cuh"

constexpr int EMPTY_THREADS = 128;

__global__ void empty_kernel() {}

/// A graph of `nodes` empty kernels in a row.
class EmptyGraph {
  public:
    EmptyGraph(const Device& device, int nodes) {
        // A stream of its own: a capture that fails spoils its stream.
        cudaStream_t stream = nullptr;
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        cudaError_t status = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        for (int i = 0; i < nodes && status == cudaSuccess; ++i) {
            empty_kernel<<<device.sm_count, EMPTY_THREADS, 0, stream>>>();
            status = cudaGetLastError();
        }
        const cudaError_t ended = cudaStreamEndCapture(stream, &graph_);
        cudaStreamDestroy(stream);
        if (status == cudaSuccess) status = ended;
        size_t captured = 0;
        if (status == cudaSuccess) status = cudaGraphGetNodes(graph_, nullptr, &captured);
        if (status == cudaSuccess) status = cudaGraphInstantiate(&executable_, graph_, 0);
        if (status == cudaSuccess) status = cudaGraphUpload(executable_, device.stream);
        if (status != cudaSuccess || captured != static_cast<size_t>(nodes)) {
            destroy();
            check(status, "recording a CUDA graph");
            throw Failure("the graph has " + std::to_string(captured) + " nodes, not " + std::to_string(nodes));
        }
    }
    ~EmptyGraph() { destroy(); }
    EmptyGraph(const EmptyGraph&) = delete;
    EmptyGraph& operator=(const EmptyGraph&) = delete;

    void replay(cudaStream_t stream) const { CHECK(cudaGraphLaunch(executable_, stream)); }

  private:
    void destroy() {
        if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
        if (graph_ != nullptr) cudaGraphDestroy(graph_);
    }

    cudaGraph_t graph_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
};

inline Value graph_node_gap_us(const Device& device, int) {
    constexpr int FEW = 20, MANY = 520, REPETITIONS = 50;
    const EmptyGraph few(device, FEW), many(device, MANY);
    Stopwatch stopwatch(device.stream);
    const auto cost = [&](int nodes) {
        return stopwatch.microseconds([&] { (nodes == FEW ? few : many).replay(device.stream); });
    };
    return Value::median_of(cost_of_one_more(FEW, MANY, REPETITIONS, cost), 0.05, 50);
}

inline Value stream_launch_us(const Device& device, int) {
    constexpr int LAUNCHES = 256, REPETITIONS = 40, WARM_UP = 3;
    const Shape shape{device.sm_count, EMPTY_THREADS};
    std::vector<double> samples;
    for (int i = 0; i < WARM_UP + REPETITIONS; ++i) {
        CHECK(cudaStreamSynchronize(device.stream));
        const auto begin = std::chrono::steady_clock::now();
        for (int n = 0; n < LAUNCHES; ++n) launch(shape, device.stream, empty_kernel);
        const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - begin;
        CHECK(cudaStreamSynchronize(device.stream));
        if (i >= WARM_UP) samples.push_back(taken.count() / LAUNCHES);
    }
    return Value::median_of(samples, 0.1, 500);
}
