// Numbers below the normal range count as zero while an object of this class lives, on its thread.
//
// Errors fade by the depth: 32 layers below the output they are around 1e-40, where a multiply-add takes a hundred times as
// long on many CPUs.
#pragma once

#include <cstdint>

#include "vector.h"

PCFAST_BEGIN

class SubnormalsAreZero {
 public:
  explicit SubnormalsAreZero(bool now) : before_(read()) {
#if defined(__x86_64__)
    constexpr uint64_t kBits = 0x8040;  // flush to zero, denormals are zero
#else
    constexpr uint64_t kBits = uint64_t{1} << 24;  // FZ
#endif
    if (now) write(before_ | kBits);
  }
  ~SubnormalsAreZero() { write(before_); }
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

 private:
#if defined(__x86_64__)
  static uint64_t read() { return __builtin_ia32_stmxcsr(); }
  static void write(uint64_t bits) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(bits)); }
#elif defined(__aarch64__)
  static uint64_t read() {
    uint64_t bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void write(uint64_t bits) { asm volatile("msr fpcr, %0" ::"r"(bits)); }
#else
  static uint64_t read() { return 0; }
  static void write(uint64_t) {}
#endif

  uint64_t before_;
};

PCFAST_END
