// Runs a grid on the calling OS thread.
#pragma once

#include <cstddef>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "barrier.h"
#include "launch_error.h"
#include "threads.h"

namespace pcfast::host {

// The CUDA errors of the same launch on a GPU.
constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kInvalidConfiguration = 9;

constexpr unsigned kMaxBlockThreads = 1024;
constexpr std::size_t kMaxSharedBytes = 2 * 227 * 1024;  // twice the GPU's: numbers may be doubles here
constexpr std::size_t kMaxTsanThreads = 8000;  // ThreadSanitizer ends the process a little above

// Kept from launch to launch: mapping a thousand stacks takes longer than a small grid.
inline thread_local std::vector<FiberStack> spare_stacks;

// The first function of every fiber.
PCFAST_UNSEEN_BY_TSAN inline void run_thread() {
  Thread& self = this_thread();
  Grid& grid = *current_grid;
  complete_switch(self.context);
  grid.start.acquire();
  try {
    grid.kernel(grid.arguments);
  } catch (...) {
    grid.error = std::current_exception();
    grid.ready = {};  // nobody goes on
  }
  grid.end.release();
  self.returned = true;
  leave(self);
  std::terminate();  // a thread that returned is never resumed
}

// What to say when no thread can go on though some have not returned.
inline LaunchError deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string message;
  for (const auto& block : blocks) {
    std::size_t returned = 0, here = 0;
    const Thread* first = nullptr;
    for (const Thread& thread : block->threads) {
      if (thread.returned) ++returned;
      if (!thread.waits) continue;
      if (first == nullptr) first = &thread;
      if (same_site(thread.site, first->site)) ++here;
    }
    if (first == nullptr) continue;
    message = describe(*block) + ": deadlock: " + std::to_string(here) + " of " +
              std::to_string(block->threads.size()) + " threads wait at " + describe(first->site) +
              ", thread " + std::to_string(first->number) + " first; returned: " + std::to_string(returned);
    const std::size_t elsewhere = block->threads.size() - here - returned;
    if (elsewhere > 0) message += ", waiting elsewhere: " + std::to_string(elsewhere);
    break;
  }
  return LaunchError(Fault::kDeadlock, message);
}

class Stacks {
 public:
  explicit Stacks(std::size_t count) {
    // ThreadSanitizer would take one fiber's frames for accesses to another's: it needs fresh memory.
    if (!kThreadSanitizer) stacks_.swap(spare_stacks);
    stacks_.reserve(count);
    while (stacks_.size() < count) stacks_.emplace_back();
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    if (!kThreadSanitizer) spare_stacks.swap(stacks_);
  }

  const FiberStack& operator[](std::size_t i) const { return stacks_[i]; }

 private:
  std::vector<FiberStack> stacks_;
};

// Runs these blocks together until all of their threads have returned.
inline void run_blocks(Grid& grid, const std::vector<std::unique_ptr<Block>>& blocks, const Stacks& stacks) {
  std::size_t started = 0;
  for (const auto& block : blocks) {
    for (Thread& thread : block->threads) {
      start_fiber(thread.context, stacks[started++], run_thread);
      grid.ready.append(thread);
    }
  }
  grid.start.release();
  Thread* first = grid.ready.take_first();
  set_running(first);
  transfer(grid.home, first->context);
  grid.end.acquire();
  bool all_returned = true;
  for (const auto& block : blocks) {
    for (Thread& thread : block->threads) {
      all_returned = all_returned && thread.returned;
      end_fiber(thread.context);
    }
  }
  if (grid.error) std::rethrow_exception(grid.error);
  if (!all_returned) throw deadlock(blocks);
}

// Runs `body` as every thread of the grid. Returns the CUDA error of an impossible shape; throws LaunchError.
template <class Body>
int launch(dim3 shape, dim3 block_shape, std::size_t shared_bytes, const Body& body) {
  const std::size_t block_count = std::size_t{shape.x} * shape.y * shape.z;
  const std::size_t block_threads = std::size_t{block_shape.x} * block_shape.y * block_shape.z;
  if (block_count == 0 || block_threads == 0 || block_threads > kMaxBlockThreads) return kInvalidConfiguration;
  if (shared_bytes > kMaxSharedBytes) return kInvalidValue;

  // Blocks run one after another. Under ThreadSanitizer all are in flight, unordered: races between them show.
  const std::size_t together = kThreadSanitizer ? block_count : 1;
  if (kThreadSanitizer && together * block_threads > kMaxTsanThreads) {
    throw LaunchError(Fault::kTooLarge, "ThreadSanitizer cannot follow " + std::to_string(together * block_threads) +
                                            " threads; launch fewer blocks");
  }

  Grid grid;
  grid.shape = shape;
  grid.block_shape = block_shape;
  grid.kernel = [](const void* arguments) { (*static_cast<const Body*>(arguments))(); };
  grid.arguments = &body;
  adopt_this_thread(grid.home);
  const Stacks stacks(together * block_threads);

  struct Current {  // the grid stops being current however the launch ends
    explicit Current(Grid* grid) { current_grid = grid; }
    ~Current() {
      current_grid = nullptr;
      set_running(nullptr);
    }
  } const current(&grid);

  for (std::size_t first = 0; first < block_count; first += together) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (std::size_t number = first; number < first + together; ++number) {
      const uint3 index{static_cast<unsigned>(number % shape.x), static_cast<unsigned>(number / shape.x % shape.y),
                        static_cast<unsigned>(number / shape.x / shape.y)};
      blocks.push_back(std::make_unique<Block>(index, block_shape, shared_bytes));
    }
    run_blocks(grid, blocks, stacks);
  }
  return kSuccess;
}

}  // namespace pcfast::host
