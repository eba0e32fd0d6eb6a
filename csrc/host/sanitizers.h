// What ThreadSanitizer and AddressSanitizer are told about fibers and shared memory. Empty without a sanitizer.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// For the scheduler: one thread's steps on behalf of others are no accesses of the kernel. Whatever such a
// function calls inline is still seen, so they work on plain structs and pointers.
#define PCFAST_UNSEEN_BY_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define PCFAST_UNSEEN_BY_TSAN
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pcfast::host {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// A place where threads hand over their writes: what came before a release is visible after a later acquire.
struct OrderToken {
  long long address_only = 0;

  PCFAST_UNSEEN_BY_TSAN void release() {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&address_only);
#endif
  }

  PCFAST_UNSEEN_BY_TSAN void acquire() {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&address_only);
#endif
  }
};

inline void poison([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory, bytes);
#endif
}

inline void unpoison([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace pcfast::host
