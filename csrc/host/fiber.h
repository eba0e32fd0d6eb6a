// Fibers: several stacks on one OS thread, and the switch between them.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "The host build of the kernels switches stacks with x86-64 Linux assembly; build it there."
#endif

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>
#include <utility>

#include "sanitizers.h"

namespace pcfast::host {

// Room for a fully inlined kernel in a debug build; pages that are never touched cost nothing.
constexpr std::size_t kFiberStackBytes = 256 * 1024;

// A stack with an unmapped page below it, so that an overflow faults at once.
class FiberStack {
 public:
  FiberStack() {
    const std::size_t guard = guard_bytes();
    void* memory = mmap(nullptr, kFiberStackBytes + guard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<unsigned char*>(memory);
    if (mprotect(mapping_, guard, PROT_NONE) != 0) {
      munmap(mapping_, kFiberStackBytes + guard);
      throw std::bad_alloc();
    }
  }
  FiberStack(FiberStack&& other) noexcept : mapping_(std::exchange(other.mapping_, nullptr)) {}
  FiberStack(const FiberStack&) = delete;
  FiberStack& operator=(const FiberStack&) = delete;
  FiberStack& operator=(FiberStack&&) = delete;
  ~FiberStack() {
    if (mapping_ != nullptr) munmap(mapping_, kFiberStackBytes + guard_bytes());
  }

  unsigned char* bottom() const { return mapping_ + guard_bytes(); }
  unsigned char* top() const { return bottom() + kFiberStackBytes; }

 private:
  static std::size_t guard_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

  unsigned char* mapping_;
};

// One line of execution that can be left and resumed: a fiber, or the OS thread's own stack.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;  // the bounds and the fake stack are AddressSanitizer's
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

inline constinit thread_local Context* last_left = nullptr;

// Stores the callee-saved registers and the stack pointer of the caller, and takes up those of the other side.
// The floating-point control words are the same on all fibers, so they stay.
__attribute__((naked, noipa, no_sanitize("thread", "address", "undefined"))) inline void switch_stacks(
    [[maybe_unused]] void** saved, [[maybe_unused]] void* resumed) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
constexpr int kSavedRegisters = 6;

// To be called first on a fiber; transfer() does it for a resumed one.
PCFAST_UNSEEN_BY_TSAN inline void complete_switch([[maybe_unused]] Context& here) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(here.fake_stack, &last_left->stack_bottom, &last_left->stack_bytes);
#endif
}

// Leaves `from` and goes on in `to`; returns when something transfers back. A context left for good never returns.
PCFAST_UNSEEN_BY_TSAN inline void transfer(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
  last_left = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(&from.stack_pointer, to.stack_pointer);
  complete_switch(from);
}

// Makes `context` a fiber that starts in `entry`, which must never return.
inline void start_fiber(Context& context, const FiberStack& stack, void (*entry)()) {
  // The frames that the last user of the stack never returned from are still marked.
  unpoison(stack.bottom(), kFiberStackBytes);
  void** top = reinterpret_cast<void**>(stack.top());
  *--top = nullptr;  // entry's return address; it also gives entry the stack alignment of a called function
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context = {};
  context.stack_pointer = top;
  context.stack_bottom = stack.bottom();
  context.stack_bytes = kFiberStackBytes;
#if defined(__SANITIZE_THREAD__)
  context.tsan_fiber = __tsan_create_fiber(0);
#endif
}

inline void end_fiber([[maybe_unused]] Context& context) {
#if defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(context.tsan_fiber);
  context.tsan_fiber = nullptr;
#endif
}

inline void adopt_this_thread([[maybe_unused]] Context& context) {
#if defined(__SANITIZE_THREAD__)
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
}

}  // namespace pcfast::host
