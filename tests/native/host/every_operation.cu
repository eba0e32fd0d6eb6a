// Makes nvcc compile every operation in every form.
#include "operations.cuh"

namespace operations {

template __global__ void load_matrix<1, false>(uint32_t*, const uint4*, const int*);
template __global__ void load_matrix<2, false>(uint32_t*, const uint4*, const int*);
template __global__ void load_matrix<4, false>(uint32_t*, const uint4*, const int*);
template __global__ void load_matrix<1, true>(uint32_t*, const uint4*, const int*);
template __global__ void load_matrix<2, true>(uint32_t*, const uint4*, const int*);
template __global__ void load_matrix<4, true>(uint32_t*, const uint4*, const int*);
template __global__ void shuffle<float>(Shuffled<float>*, const float*, const int*, int);
template __global__ void shuffle<double>(Shuffled<double>*, const double*, const int*, int);
template __global__ void shuffle<int>(Shuffled<int>*, const int*, const int*, int);
template __global__ void copy<4>(unsigned char*, const unsigned char*, const int*);
template __global__ void copy<8>(unsigned char*, const unsigned char*, const int*);
template __global__ void copy<16>(unsigned char*, const unsigned char*, const int*);

__global__ void ordered(int* values) {
  values[threadIdx.x] += 1;
  __syncwarp();
  values[threadIdx.x ^ 1] += 1;
}

int launch_ordered(int* values, void* stream) {
  return pcfast::tile::launch(ordered, dim3(1), dim3(32), 64 * 1024, stream, values);
}

}  // namespace operations
