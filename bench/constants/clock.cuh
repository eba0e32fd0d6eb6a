// The clock of the SMs.
//
//   sm_clock_mhz    cycles by clock64 over nanoseconds by globaltimer, while every SM runs a chain of
//                   multiply-adds for 5 ms. Under heavier work, such as long matrix products, a chip may clock lower.
#pragma once

#include "harness.cuh"
#include "ptx.cuh"

constexpr uint64_t BUSY_NANOSECONDS = 5'000'000;
constexpr uint64_t BUSY_CYCLES_AT_MOST = 50'000'000;  // in case globaltimer stands still

struct Interval {
    uint64_t cycles, nanoseconds;
};

__global__ void stay_busy(float seed, Interval* intervals, float* result) {
    const uint64_t begin_ns = ptx::global_nanoseconds(), begin = ptx::sm_cycles();
    Interval taken{0, 0};
    float x = seed + threadIdx.x;
    while (taken.nanoseconds < BUSY_NANOSECONDS && taken.cycles < BUSY_CYCLES_AT_MOST) {
#pragma unroll 16
        for (int i = 0; i < 256; ++i) x = fmaf(x, 0.999f, 1.0f);
        taken.nanoseconds = ptx::global_nanoseconds() - begin_ns;
        taken.cycles = ptx::sm_cycles() - begin;
    }
    result[blockIdx.x * blockDim.x + threadIdx.x] = x;
    if (threadIdx.x == 0) intervals[blockIdx.x] = taken;
}

/// What the first block saw, `repetitions` times.
inline std::vector<Interval> busy_intervals(const Device& device, int repetitions) {
    const Shape shape{device.sm_count, 256};
    Buffer<Interval> intervals(shape.blocks);
    Buffer<float> result(static_cast<size_t>(shape.blocks) * shape.threads);
    std::vector<Interval> seen;
    for (int i = 0; i < repetitions; ++i) {
        launch(shape, device.stream, stay_busy, 1.0f, intervals.get(), result.get());
        seen.push_back(intervals.download(device.stream).front());
    }
    return seen;
}

inline Value sm_clock_mhz(const Device& device) {
    std::vector<double> samples;
    for (const Interval& taken : busy_intervals(device, 20)) {
        if (taken.nanoseconds < BUSY_NANOSECONDS) throw Failure("globaltimer does not advance");
        samples.push_back(1e3 * static_cast<double>(taken.cycles) / static_cast<double>(taken.nanoseconds));
    }
    return Value::median_of(samples, 100, 5000);
}

/// Half a second of work, so that an idle chip raises its clock before anything is timed.
inline void warm_up(const Device& device) { busy_intervals(device, 100); }
