// Measures the constants of a GPU that a planner of fused relaxation kernels needs; prints one JSON object on stdout.
//
//     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o constants constants.cu && ./constants
//
// measure.py does that, adds the rates of matrix products and keeps the result; pcfast/backends/gpu_constants.py reads it.
//
// {"device": name, ..., "measured": {constant: number | {"median", "p20", "p80", "samples"}}, "not_measured": {constant: reason}}
//
// Units stand in the names. What is measured, and how, stands at the top of the file that measures it. Every entry has
// ten seconds, all of them together 45; one that fails is reported and the next one runs. Exit status: report.h.

#include "clock.cuh"
#include "harness.cuh"
#include "memory.cuh"
#include "report.h"

constexpr int SECONDS_FOR_ONE = 10, SECONDS_FOR_ALL = 45;

/// One constant.
struct Measurement {
    const char* name;
    Value (*measure)(const Device&);
};

constexpr Measurement MEASUREMENTS[] = {
    {"shared_memory_bytes_per_clk_sm", shared_memory_bytes_per_clk_sm},
    {"copy_bandwidth_gbs", copy_bandwidth_gbs},
    {"sm_clock_mhz", sm_clock_mhz},
};

void describe(const Device& device, Report& report) {
    int driver = 0, runtime = 0;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    const auto version = [](int number) {  // 13000 -> "13.0"
        return quoted(std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10));
    };
    report.describe("device", quoted(device.name));
    report.describe("compute_capability", quoted(std::to_string(device.major) + "." + std::to_string(device.minor)));
    report.describe("cuda_driver", version(driver));
    report.describe("cuda_runtime", version(runtime));
    report.measured("sm_count", Value::exact(device.sm_count));
    report.measured("l2_bytes", Value::exact(device.l2_bytes));
    report.measured("shared_memory_per_block_bytes", Value::exact(device.shared_bytes_per_block));
    report.measured("shared_memory_per_sm_bytes", Value::exact(device.shared_bytes_per_sm));
}

/// The device, ready and warm, with what it says of itself in the report.
Device prepare(Report& report, Watchdog& watchdog) {
    watchdog.expect("opening the device", 30);  // the first CUDA call can take seconds
    Device device = Device::open();
    describe(device, report);
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, hold_stream);
    if (status != cudaSuccess) {
        throw Failure(std::string("this program holds no code for compute capability ") +
                      std::to_string(device.major) + "." + std::to_string(device.minor) + ": " +
                      cudaGetErrorName(status) + "; build it with -gencode for that");
    }
    warm_up(device);
    return device;
}

/// All measurements one after the other; the exit status.
int measure_all(const Device& device, Report& report, Watchdog& watchdog) {
    const auto begin = Watchdog::Clock::now();
    int status = EXIT_MEASURED;
    std::string lost;  // why the device cannot be used any more
    const auto measure = [&](const Measurement& what) {
        if (lost.empty() && Watchdog::Clock::now() - begin > std::chrono::seconds(SECONDS_FOR_ALL)) {
            lost = "out of time";
            status = EXIT_FAILED;
        }
        if (!lost.empty()) {
            report.not_measured(what.name, lost);
            return;
        }
        watchdog.expect(what.name, SECONDS_FOR_ONE);
        try {
            report.measured(what.name, what.measure(device));
        } catch (const Unsupported& reason) {
            report.not_measured(what.name, reason.what());
        } catch (const std::exception& error) {
            report.not_measured(what.name, error.what());
            status = EXIT_FAILED;
            // Some errors are over with being reported, others end the context.
            cudaGetLastError();
            if (cudaDeviceSynchronize() != cudaSuccess) lost = std::string("the CUDA context was lost in ") + what.name;
        }
    };
    for (const Measurement& what : MEASUREMENTS) measure(what);
    return status;
}

int main() {
    Report report;
    int status = EXIT_MEASURED;
    {
        Watchdog watchdog(report);
        try {
            const Device device = prepare(report, watchdog);
            status = measure_all(device, report, watchdog);
        } catch (const std::exception& error) {
            std::printf("{\"error\": %s}\n", quoted(error.what()).c_str());
            return EXIT_NOTHING;
        }
    }
    report.print();
    return status;
}
