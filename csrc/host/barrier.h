// Where the threads of a block or a warp meet.
//
// Stricter than a GPU of compute capability 7 or newer, which only counts arrivals and does not count threads that
// have returned: here every thread of the block (every lane of the warp) must reach the same operation in the
// source. A thread that returns while others wait is a deadlock.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

#include "launch_error.h"
#include "threads.h"

namespace pcfast::host {

inline std::string describe(const CallSite& site) {
  return std::string(site.operation) + " (" + site.where.file_name() + ":" + std::to_string(site.where.line()) + ")";
}

inline std::string describe(const Block& block) {
  const uint3 index = block.index;
  return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

[[noreturn]] inline void fail(Fault fault, const std::string& message, const CallSite& site) {
  const Thread& self = this_thread();
  throw LaunchError(fault, describe(*self.block) + ", thread " + std::to_string(self.number) + ": " +
                               describe(site) + ": " + message);
}

PCFAST_UNSEEN_BY_TSAN inline bool same_site(const CallSite& one, const CallSite& other) {
  const char* file = one.where.file_name();
  const char* other_file = other.where.file_name();
  return one.where.line() == other.where.line() && one.where.column() == other.where.column() &&
         (file == other_file || std::strcmp(file, other_file) == 0);
}

[[noreturn]] inline void fail_apart(const Barrier& barrier, const CallSite& site) {
  fail(Fault::kDeadlock,
       "deadlock: thread " + std::to_string(barrier.waiting.first()->number) + " waits at another, " +
           describe(barrier.site),
       site);
}

enum class Ordering { kMemory, kNothing };

// Waits until all threads of the barrier are here. The last to arrive first runs `at_last` on `operands`.
PCFAST_UNSEEN_BY_TSAN inline void meet(Barrier& barrier, const CallSite& site, Ordering ordering,
                                       void (*at_last)(void* const* operands) = nullptr,
                                       void* const* operands = nullptr) {
  Thread& self = this_thread();
  if (barrier.arrived > 0 && !same_site(barrier.site, site)) fail_apart(barrier, site);
  OrderToken& token = barrier.tokens[barrier.phase % 2];
  if (ordering == Ordering::kMemory) token.release();
  if (++barrier.arrived == barrier.expected) {
    if (at_last != nullptr) at_last(operands);
    barrier.arrived = 0;
    ++barrier.phase;
    for (Thread* thread = barrier.waiting.first(); thread != nullptr; thread = thread->next) thread->waits = false;
    // Before those that are ready already: a warp's lanes follow one another while their stacks are in the cache.
    current_grid->ready.prepend(barrier.waiting);
  } else {
    barrier.site = site;
    self.site = site;
    self.waits = true;
    barrier.waiting.append(self);
    leave(self);
  }
  if (ordering == Ordering::kMemory) token.acquire();
}

inline void block_barrier(const CallSite& site) { meet(this_thread().block->barrier, site, Ordering::kMemory); }

inline void warp_barrier(const CallSite& site) { meet(this_thread().warp->barrier, site, Ordering::kMemory); }

// An operation of all 32 lanes together: `work` gets every lane's operands, and may write into them. As on the GPU
// it orders no memory accesses: writes that other lanes are to read still need a barrier.
PCFAST_UNSEEN_BY_TSAN inline void warp_operation(const CallSite& site, void* operands, void (*work)(void* const* lanes)) {
  Thread& self = this_thread();
  Warp& warp = *self.warp;
  if (warp.barrier.expected != kWarpLanes) fail(Fault::kDeadlock, "the warp has fewer than 32 threads", site);
  warp.operands[self.lane] = operands;
  meet(warp.barrier, site, Ordering::kNothing, work, warp.operands);
}

// What the GPU answers with an error, and only for the width of the access.
inline void require_aligned(const void* address, std::size_t bytes, const CallSite& site) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    fail(Fault::kMisaligned, "misaligned: the address is not a multiple of " + std::to_string(bytes) + " bytes", site);
  }
}

inline void require_shared(const void* address, std::size_t bytes, const CallSite& site) {
  if (!this_thread().block->shared.contains(address, bytes)) {
    fail(Fault::kNotShared, "the address is outside the block's shared memory", site);
  }
}

}  // namespace pcfast::host
