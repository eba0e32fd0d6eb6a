// The resident kernel's entry in the C interface.
#include <cstddef>
#include <cstring>

#include "../abi.h"
#include "relaxation.cuh"
#include "validation.h"

namespace pcfast::resident {
namespace {

template <class Real>
int start(const Program& program, const Tensors& tensors, const RunParams& run, int threads, void* stream) {
  const unsigned blocks = ceil_div(run.batch, program.samples);
  return tile::launch(relaxation<Real>, dim3(blocks), dim3(threads), program.elements * sizeof(Real), stream, program,
                      tensors, run);
}

}  // namespace
}  // namespace pcfast::resident

extern "C" int pcfast_resident(const void* program, const void* tensors, const void* run, int scalar_bytes, int threads,
                               void* stream) {
  using namespace pcfast::resident;
  Program program_copy;  // copies: bytes from elsewhere lie at any address
  Tensors tensors_copy;
  RunParams run_copy;
  std::memcpy(&program_copy, program, sizeof program_copy);
  std::memcpy(&tensors_copy, tensors, sizeof tensors_copy);
  std::memcpy(&run_copy, run, sizeof run_copy);
  if (threads < kWarpSize || threads > kMaxThreads || threads % kWarpSize) return PCFAST_INVALID_ARGUMENT;
  if (scalar_bytes != sizeof(float) && scalar_bytes != sizeof(double)) return PCFAST_INVALID_ARGUMENT;
  if (!Validation(program_copy, tensors_copy, run_copy, scalar_bytes, threads).passes()) return PCFAST_INVALID_ARGUMENT;
  if (scalar_bytes == sizeof(float)) return start<float>(program_copy, tensors_copy, run_copy, threads, stream);
#ifndef __CUDACC__
  // golden vectors are met in double, on the CPU
  if (scalar_bytes == sizeof(double)) return start<double>(program_copy, tensors_copy, run_copy, threads, stream);
#endif
  return PCFAST_INVALID_ARGUMENT;
}

extern "C" void pcfast_resident_sizes(int* program, int* tensors, int* run) {
  *program = sizeof(pcfast::resident::Program);
  *tensors = sizeof(pcfast::resident::Tensors);
  *run = sizeof(pcfast::resident::RunParams);
}
