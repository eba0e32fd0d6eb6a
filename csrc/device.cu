// What the CUDA runtime says of itself, the driver and the GPUs. Nothing here creates a context on a GPU.
#include <cuda_runtime.h>

#include "abi.h"

namespace {

// The caller has the error from here; left behind, it would surface in somebody else's next check.
int forget(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

}  // namespace

int pcfast_abi_version() { return PCFAST_ABI_VERSION; }

const char* pcfast_error_text(int status) {
  if (status == PCFAST_INVALID_ARGUMENT) return "an argument that the kernel cannot use";
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

const char* pcfast_architectures() { return PCFAST_ARCHITECTURES; }

int pcfast_driver_version(int* version) {
  *version = 0;
  return forget(cudaDriverGetVersion(version));
}

int pcfast_runtime_version(int* version) {
  *version = 0;
  return forget(cudaRuntimeGetVersion(version));
}

int pcfast_device_count(int* count) {
  *count = 0;
  return forget(cudaGetDeviceCount(count));
}

int pcfast_device_capability(int device, int* major, int* minor) {
  *major = *minor = 0;
  const int status = forget(cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device));
  return status ? status : forget(cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device));
}
