// A thread's memory.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "vector.h"

PCFAST_BEGIN

// It is handed out in lines of 64 bytes; with null for `at` it only counts.
struct Arena {
  char* at;
  size_t used = 0;

  template <class T>
  T* take(size_t count) {
    char* result = at == nullptr ? nullptr : at + used;
    const size_t bytes = count * sizeof(T);
    size_t room = (bytes + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    room += 64;  // nobody's
    if (result != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(result, bytes);
      ASAN_POISON_MEMORY_REGION(result + bytes, room - bytes);
    }
#endif
    used += room;
    return reinterpret_cast<T*>(result);
  }
};

PCFAST_END
