// The resident kernel's instantiations, and its entry in the C interface.
#include <cstddef>

#include "../abi.h"
#include "relaxation.cuh"

namespace pcfast::resident {
namespace {

template <class Real, int GROUP>
int start(const Program& program, const Tensors& tensors, const Run& run, int threads, void* stream) {
  const unsigned blocks = ceil_div(run.batch, program.samples);
  return tile::launch(relaxation<Real, GROUP>, dim3(blocks), dim3(threads), program.elements * sizeof(Real), stream,
                      program, tensors, run);
}

template <class Real>
int start_for(const Program& program, const Tensors& tensors, const Run& run, int threads, void* stream) {
  switch (program.group) {
    case 1:
      return start<Real, 1>(program, tensors, run, threads, stream);
    case 2:
      return start<Real, 2>(program, tensors, run, threads, stream);
    case 3:
      return start<Real, 3>(program, tensors, run, threads, stream);
    case 4:
      return start<Real, 4>(program, tensors, run, threads, stream);
    default:
      return PCFAST_INVALID_ARGUMENT;
  }
}

}  // namespace
}  // namespace pcfast::resident

extern "C" int pcfast_resident(const void* program, const void* tensors, const void* run, int scalar_bytes, int threads,
                               void* stream) {
  using namespace pcfast::resident;
  const Program& what = *static_cast<const Program*>(program);
  const Tensors& where = *static_cast<const Tensors*>(tensors);
  const Run& how = *static_cast<const Run*>(run);
  if (threads < kWarpSize || threads > kMostThreads || threads % kWarpSize) return PCFAST_INVALID_ARGUMENT;
  if (scalar_bytes == sizeof(float)) return start_for<float>(what, where, how, threads, stream);
#ifndef __CUDACC__
  // golden vectors are met in double, on the CPU
  if (scalar_bytes == sizeof(double)) return start_for<double>(what, where, how, threads, stream);
#endif
  return PCFAST_INVALID_ARGUMENT;
}

extern "C" void pcfast_resident_sizes(int* program, int* tensors, int* run) {
  *program = sizeof(pcfast::resident::Program);
  *tensors = sizeof(pcfast::resident::Tensors);
  *run = sizeof(pcfast::resident::Run);
}
