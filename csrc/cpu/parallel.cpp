// Threads: OpenMP's, whose runtime is the one that torch has loaded; or, for sanitizers that do not know OpenMP, C++'s.
#include "program.h"

#ifdef PCFAST_CPU_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace pcfast::cpu {

// With one thread there is no parallel region at all: a process that was forked may call this.
void parallel(int threads, void (*body)(void*), void* context) {
  if (threads <= 1) return body(context);
#ifdef PCFAST_CPU_STD_THREADS
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
  body(context);
  for (std::thread& other : others) other.join();
#else
#pragma omp parallel num_threads(threads)
  body(context);
#endif
}

}  // namespace pcfast::cpu
