// The C interface as a Python module. Functions that fail return their status first, and no exception.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "abi.h"

namespace {

std::tuple<int, int> with_status(int (*read)(int*)) {
  int value = 0;
  const int status = read(&value);
  return {status, value};
}

std::tuple<int, int, int> device_capability(int device) {
  int major = 0, minor = 0;
  const int status = pcfast_device_capability(device, &major, &minor);
  return {status, major, minor};
}

std::tuple<int, int, int> resident_sizes() {
  int program = 0, tensors = 0, run = 0;
  pcfast_resident_sizes(&program, &tensors, &run);
  return {program, tensors, run};
}

int resident(std::string_view program, std::string_view tensors, std::string_view run, int scalar_bytes, int threads,
             std::uintptr_t stream) {
  const auto [program_size, tensors_size, run_size] = resident_sizes();
  const auto holds = [](std::string_view bytes, int size) { return bytes.size() == static_cast<std::size_t>(size); };
  if (!holds(program, program_size) || !holds(tensors, tensors_size) || !holds(run, run_size))
    return PCFAST_INVALID_ARGUMENT;
  return pcfast_resident(program.data(), tensors.data(), run.data(), scalar_bytes, threads,
                         reinterpret_cast<void*>(stream));
}

}  // namespace

// PCFAST_MODULE is _native, or _native_host in a build for the CPU.
PYBIND11_MODULE(PCFAST_MODULE, module) {
  // A launch waits where the stream is full, and a kernel on the CPU runs in the call.
  using without_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

  module.def("abi_version", pcfast_abi_version);
  module.def("error_text", pcfast_error_text);
  module.def("architectures", pcfast_architectures);
  module.def("driver_version", [] { return with_status(pcfast_driver_version); });
  module.def("runtime_version", [] { return with_status(pcfast_runtime_version); });
  module.def("device_count", [] { return with_status(pcfast_device_count); });
  module.def("device_capability", device_capability);
  module.def("resident", resident, without_gil());
  module.def("resident_sizes", resident_sizes);
  module.def("resident_constants", pcfast_resident_constants);
}
