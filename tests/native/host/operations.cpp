// The operations' kernels as functions of a shared library, for a comparison with numpy.
#include "operations.cuh"

#include "calls.h"

namespace {

constexpr std::size_t kRowsBytes = 32 * 16;

template <class Kernel, class... A>
int run(Kernel kernel, std::size_t shared_bytes, A... args) {
  return status_of([&] {
    return pcfast::tile::launch(kernel, dim3(1), dim3(pcfast::tile::kWarpSize), shared_bytes, nullptr, args...);
  });
}

template <bool kTransposed>
int run_load(int count, uint32_t* registers, const uint4* rows, const int* order) {
  switch (count) {
    case 1:
      return run(operations::load_matrix<1, kTransposed>, kRowsBytes, registers, rows, order);
    case 2:
      return run(operations::load_matrix<2, kTransposed>, kRowsBytes, registers, rows, order);
    default:
      return run(operations::load_matrix<4, kTransposed>, kRowsBytes, registers, rows, order);
  }
}

template <int kBytes>
int run_copy(unsigned char* seen, const unsigned char* global, const int* valid) {
  return run(operations::copy<kBytes>, 2 * pcfast::tile::kWarpSize * kBytes, seen, global, valid);
}

}  // namespace

extern "C" {

int multiply_bf16(float* d, const uint32_t* a, const uint32_t* b) { return run(operations::multiply_bf16, 0, d, a, b); }

int multiply_tf32(float* d, const uint32_t* a, const uint32_t* b) { return run(operations::multiply_tf32, 0, d, a, b); }

int load_matrix(int count, int transposed, uint32_t* registers, const uint4* rows, const int* order) {
  return transposed != 0 ? run_load<true>(count, registers, rows, order) : run_load<false>(count, registers, rows, order);
}

int shuffle_float(void* results, const float* values, const int* lanes, int mask) {
  return run(operations::shuffle<float>, 0, static_cast<operations::Shuffled<float>*>(results), values, lanes, mask);
}

int shuffle_double(void* results, const double* values, const int* lanes, int mask) {
  return run(operations::shuffle<double>, 0, static_cast<operations::Shuffled<double>*>(results), values, lanes, mask);
}

int shuffle_int(void* results, const int* values, const int* lanes, int mask) {
  return run(operations::shuffle<int>, 0, static_cast<operations::Shuffled<int>*>(results), values, lanes, mask);
}

int copy(int bytes, unsigned char* seen, const unsigned char* global, const int* valid) {
  switch (bytes) {
    case 4:
      return run_copy<4>(seen, global, valid);
    case 8:
      return run_copy<8>(seen, global, valid);
    default:
      return run_copy<16>(seen, global, valid);
  }
}

int convert(uint16_t* bf16, uint32_t* tf32, uint32_t* packed, const float* values, int count) {
  constexpr unsigned kBlock = 64;
  const unsigned blocks = (static_cast<unsigned>(count) + kBlock - 1) / kBlock;
  return status_of([&] {
    return pcfast::tile::launch(operations::convert, dim3(blocks), dim3(kBlock), 0, nullptr, bf16, tf32, packed, values,
                                count);
  });
}

int accumulate(int* sum_and_min, int blocks, int threads, int offset) {
  return status_of([&] {
    return pcfast::tile::launch(operations::accumulate, dim3(static_cast<unsigned>(blocks)),
                                dim3(static_cast<unsigned>(threads)), 0, nullptr, sum_and_min, offset);
  });
}

int locate(unsigned* places, const unsigned* grid, const unsigned* block, std::size_t shared_bytes) {
  return status_of([&] {
    return pcfast::tile::launch(operations::locate, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                                shared_bytes, nullptr, places);
  });
}

}  // extern "C"
