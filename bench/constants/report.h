// What the program says: one JSON object on stdout, and a watchdog that says it even when a kernel never ends.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

/// Exit statuses; measure.py knows them by these numbers.
enum Exit {
    EXIT_MEASURED = 0,  ///< every entry has a value, or a reason that lies in the device
    EXIT_NOTHING = 1,   ///< no usable device: the JSON holds "error" alone
    EXIT_FAILED = 2,    ///< some entry failed unexpectedly; its reason says how
    EXIT_HUNG = 3,      ///< an entry did not end; what came before it is in the JSON
};

/// A measurement went wrong.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The device cannot do what would be measured.
struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') result += '\\';
        // other control characters would need escapes; no message has one worth keeping
        result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    return result + '"';
}

/// A number as JSON text: exact, or the median of repetitions with their 20th and 80th percentiles.
struct Value {
    std::string json;

    static Value exact(long long number) { return {std::to_string(number)}; }

    /// Median, p20 and p80 of `samples`; outside [low, high] the measurement itself must be at fault.
    static Value median_of(std::vector<double> samples, double low, double high) {
        if (samples.empty()) throw Failure("no samples");
        std::sort(samples.begin(), samples.end());
        const auto quantile = [&](double share) {
            return samples[static_cast<size_t>(std::lround(share * static_cast<double>(samples.size() - 1)))];
        };
        const double median = quantile(0.5);
        if (!(median >= low && median <= high)) {
            throw Failure("measured " + std::to_string(median) + ", which is outside what is plausible (" +
                          std::to_string(low) + " to " + std::to_string(high) + ")");
        }
        char text[160];
        std::snprintf(text, sizeof text, "{\"median\": %.6g, \"p20\": %.6g, \"p80\": %.6g, \"samples\": %zu}", median,
                      quantile(0.2), quantile(0.8), samples.size());
        return {text};
    }
};

/// Values and reasons by name.
class Report {
  public:
    void describe(const std::string& key, const std::string& json) {
        std::lock_guard<std::mutex> lock(mutex_);
        header_.emplace_back(key, json);
    }

    void measured(const std::string& name, const Value& value) {
        std::lock_guard<std::mutex> lock(mutex_);
        values_[name] = value.json;
    }

    void not_measured(const std::string& name, const std::string& reason) {
        std::lock_guard<std::mutex> lock(mutex_);
        reasons_[name] = quoted(reason);
    }

    void print() {
        std::lock_guard<std::mutex> lock(mutex_);
        std::string text = "{\n";
        for (const auto& [key, json] : header_) text += " " + quoted(key) + ": " + json + ",\n";
        text += " \"measured\": " + object(values_) + ",\n \"not_measured\": " + object(reasons_) + "\n}\n";
        std::fputs(text.c_str(), stdout);
        std::fflush(stdout);
    }

  private:
    using Entries = std::map<std::string, std::string>;

    static std::string object(const Entries& entries) {
        std::string text = "{";
        const char* separator = "\n  ";
        for (const auto& [name, json] : entries) {
            text += separator + quoted(name) + ": " + json;
            separator = ",\n  ";
        }
        return text + "\n }";
    }

    std::mutex mutex_;
    std::vector<std::pair<std::string, std::string>> header_;
    Entries values_, reasons_;
};

/// Ends the process when one measurement takes too long: a kernel that hangs cannot be stopped in any other way, and
/// every CUDA call after it would hang too. The report is printed first.
class Watchdog {
  public:
    using Clock = std::chrono::steady_clock;

    explicit Watchdog(Report& report) : report_(report), thread_([this] { watch(); }) {}

    ~Watchdog() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            done_ = true;
        }
        changed_.notify_one();
        thread_.join();
    }

    /// From now on `name` is being measured, for `seconds` at most.
    void expect(const std::string& name, int seconds) {
        std::lock_guard<std::mutex> lock(mutex_);
        name_ = name;
        seconds_ = seconds;
        deadline_ = Clock::now() + std::chrono::seconds(seconds);
        changed_.notify_one();
    }

  private:
    void watch() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (!done_) {
            if (Clock::now() >= deadline_) {
                report_.not_measured(name_, "the host waited " + std::to_string(seconds_) + " s for the device and gave up");
                report_.describe("stopped_at", quoted(name_));
                report_.print();
                _exit(EXIT_HUNG);  // no destructors: they would wait for the device
            }
            if (deadline_ == Clock::time_point::max()) {
                changed_.wait(lock);  // wait_until overflows on this deadline in some libraries
            } else {
                changed_.wait_until(lock, deadline_);
            }
        }
    }

    Report& report_;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool done_ = false;
    std::string name_;
    int seconds_ = 0;
    Clock::time_point deadline_ = Clock::time_point::max();
    std::thread thread_;  // last: it starts when everything above exists
};
