// The memory of a call. The last call's is kept for the next one: fresh pages cost as much as a small relaxation.
#include <atomic>
#include <cstdlib>
#include <new>

#include "program.h"

namespace pcfast::cpu {

namespace {

constexpr size_t kAlignment = 64, kMostKept = size_t{256} << 20;

std::atomic<char*> kept{nullptr};

// A block begins with its size, in a line of its own.
size_t& size_of(char* block) { return *reinterpret_cast<size_t*>(block); }

}  // namespace

void* take_workspace(size_t bytes) {
  bytes = (bytes + 2 * kAlignment - 1) / kAlignment * kAlignment;
  char* block = kept.exchange(nullptr);
  if (block == nullptr || size_of(block) < bytes) {
    std::free(block);
    block = static_cast<char*>(std::aligned_alloc(kAlignment, bytes));
    if (block == nullptr) throw std::bad_alloc();
    size_of(block) = bytes;
  }
  return block + kAlignment;
}

void give_back_workspace(void* memory) {
  char* block = static_cast<char*>(memory) - kAlignment;
  std::free(size_of(block) > kMostKept ? block : kept.exchange(block));
}

}  // namespace pcfast::cpu
