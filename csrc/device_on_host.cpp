// In place of device.cu in a build for the CPU: no driver and no GPU.
#include "abi.h"
#include "host/launch.h"

int pcfast_abi_version() { return PCFAST_ABI_VERSION; }

const char* pcfast_error_text(int status) {
  switch (status) {
    case PCFAST_SUCCESS:
      return "no error";
    case PCFAST_INVALID_ARGUMENT:
      return "an argument that the kernel cannot use";
    case pcfast::host::kInvalidValue:
      return "invalid argument";
    case pcfast::host::kInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "unrecognized error code";
  }
}

const char* pcfast_architectures() { return ""; }

int pcfast_driver_version(int* version) { return *version = 0; }

int pcfast_runtime_version(int* version) { return *version = 0; }

int pcfast_device_count(int* count) { return *count = 0; }

int pcfast_device_capability(int, int* major, int* minor) {
  *major = *minor = 0;
  return pcfast::host::kInvalidValue;
}
