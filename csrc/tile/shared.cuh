// Pointers into the block's shared memory.
#pragma once

#include "copy.cuh"
#include "platform.cuh"

namespace pcfast::tile {

#ifdef __CUDACC__

// As the 32 bits that an access takes. nvcc gives a generic pointer's accesses two additions each, of the
// index and then of the memory's own address, which it reads from a slow register wherever it has forgotten it; here
// the sum is opaque to it and stays in a register.
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

// The same number, opaque too: nvcc reads a kernel's argument again wherever it is used.
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
