// Pointers into the block's shared memory.
#pragma once

#include "copy.cuh"
#include "platform.cuh"

namespace pcfast::tile {

#ifdef __CUDACC__

// A pointer as the 32-bit address that an access of shared memory takes. nvcc adds twice for each access by a generic
// pointer: the index, and the base of shared memory, which it rereads from a slow special register. Here the sum is opaque
// to nvcc and stays in a register.
template <class T>
class SharedPointer {
 public:
  SharedPointer() = default;
  __device__ __forceinline__ SharedPointer(T* at) : address_(shared_address(at)) { asm("" : "+r"(address_)); }

  __device__ __forceinline__ operator T*() const { return static_cast<T*>(__cvta_shared_to_generic(address_)); }
  __device__ __forceinline__ SharedPointer operator+(int step) const {
    SharedPointer moved;
    moved.address_ = address_ + step * static_cast<uint32_t>(sizeof(T));
    return moved;
  }
  __device__ __forceinline__ SharedPointer& operator+=(int step) { return *this = *this + step; }
  __device__ __forceinline__ T& operator[](int step) const { return *static_cast<T*>(*this + step); }

 private:
  uint32_t address_;
};

// Returns the same number, opaque to nvcc, which would read a kernel's argument from memory again at each use.
__device__ __forceinline__ int in_register(int value) {
  asm("" : "+r"(value));
  return value;
}

#else

template <class T>
using SharedPointer = T*;

inline int in_register(int value) { return value; }

#endif

}  // namespace pcfast::tile
