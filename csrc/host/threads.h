// The threads, warps and blocks of a grid in flight, and which of them runs.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <source_location>
#include <vector>

#include "fiber.h"
#include "pending_copies.h"
#include "sanitizers.h"
#include "vector_types.h"

namespace pcfast::host {

constexpr unsigned kWarpLanes = 32;
constexpr std::size_t kSharedAlignment = 128;

struct Block;
struct Warp;

// An operation in the kernel's source at which threads meet.
struct CallSite {
  const char* operation = nullptr;
  std::source_location where;
};

struct Thread {
  uint3 index{};
  unsigned number = 0;  // in the block, counted along x, then y, then z
  unsigned lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  PendingCopies copies;

  Context context;
  Thread* next = nullptr;  // in the list that the thread stands in
  bool waits = false;
  bool returned = false;
  CallSite site;  // where it waits
};

// First in, first out; linked through the threads, so that moving a list costs nothing.
class ThreadList {
 public:
  PCFAST_UNSEEN_BY_TSAN void append(Thread& thread) {
    thread.next = nullptr;
    (first_ == nullptr ? first_ : last_->next) = &thread;
    last_ = &thread;
  }

  // Puts all of `others` before this list's threads, and empties it.
  PCFAST_UNSEEN_BY_TSAN void prepend(ThreadList& others) {
    if (others.first_ == nullptr) return;
    others.last_->next = first_;
    if (first_ == nullptr) last_ = others.last_;
    first_ = others.first_;
    others.first_ = others.last_ = nullptr;
  }

  PCFAST_UNSEEN_BY_TSAN Thread* take_first() {
    Thread* thread = first_;
    if (thread == nullptr) return nullptr;
    first_ = thread->next;
    if (first_ == nullptr) last_ = nullptr;
    return thread;
  }

  Thread* first() const { return first_; }

 private:
  Thread* first_ = nullptr;
  Thread* last_ = nullptr;
};

struct Barrier {
  unsigned expected = 0;
  unsigned arrived = 0;
  unsigned phase = 0;
  CallSite site;  // of those that wait
  ThreadList waiting;
  // By the parity of the phase: a fast thread's next arrival must not order itself before a slow thread's wake-up.
  OrderToken tokens[2];
};

struct Warp {
  Barrier barrier;
  void* operands[kWarpLanes] = {};  // each lane's, during a warp operation
};

// Exactly the bytes asked for, in an allocation of its own: AddressSanitizer reports the first byte past the end.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kSharedAlignment, bytes) != 0) throw std::bad_alloc();
    std::memset(memory, kNaNByte, bytes);
    memory_.reset(static_cast<unsigned char*>(memory));
  }

  unsigned char* begin() const { return memory_.get(); }

  bool contains(const void* address, std::size_t bytes) const {
    const auto* first = static_cast<const unsigned char*>(address);
    return first >= begin() && first + bytes <= begin() + bytes_;
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  std::size_t bytes_;
};

struct Block {
  Block(uint3 index_, dim3 shape, std::size_t shared_bytes)
      : index(index_),
        shared(shared_bytes),
        warps((shape.x * shape.y * shape.z + kWarpLanes - 1) / kWarpLanes),
        threads(shape.x * shape.y * shape.z) {
    barrier.expected = static_cast<unsigned>(threads.size());
    for (unsigned number = 0; number < threads.size(); ++number) {
      Thread& thread = threads[number];
      thread.index = {number % shape.x, number / shape.x % shape.y, number / shape.x / shape.y};
      thread.number = number;
      thread.lane = number % kWarpLanes;
      thread.warp = &warps[number / kWarpLanes];
      thread.block = this;
      ++thread.warp->barrier.expected;
    }
  }
  Block(const Block&) = delete;  // the threads point to it
  Block& operator=(const Block&) = delete;

  uint3 index;
  SharedMemory shared;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
};

// One grid in flight.
struct Grid {
  dim3 shape;
  dim3 block_shape;
  void (*kernel)(const void* arguments) = nullptr;
  const void* arguments = nullptr;

  Context home;  // the caller's stack, taken up again when no thread can go on
  ThreadList ready;
  std::exception_ptr error;
  // Without these ThreadSanitizer would report the caller's accesses before and after the launch.
  OrderToken start;
  OrderToken end;
};

// Per OS thread, so that several can launch at a time.
inline constinit thread_local Grid* current_grid = nullptr;
inline constinit thread_local Thread* running_thread = nullptr;

inline Thread& this_thread() { return *running_thread; }

PCFAST_UNSEEN_BY_TSAN inline void set_running(Thread* thread) { running_thread = thread; }

inline unsigned char* shared_memory() { return this_thread().block->shared.begin(); }

// Leaves the running thread for the next one that can go on.
PCFAST_UNSEEN_BY_TSAN inline void leave(Thread& self) {
  Thread* next = current_grid->ready.take_first();
  running_thread = next;
  transfer(self.context, next != nullptr ? next->context : current_grid->home, self.returned);
}

}  // namespace pcfast::host
