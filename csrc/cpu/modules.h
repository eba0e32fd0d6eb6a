// The comparison of pcfast/model/module_state.py, which every step makes before any tensor work.
#pragma once

#include <cstdint>
#include <vector>

#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace pcfast::cpu {

// Whether a model and its `modules` are of `classes`, have neither hooks nor a forward of their own, and hold `names` and
// `held`: the names of parameters, buffers and children, a tuple each, module by module, and all their values. Raises
// KeyError where a module lacks what torch's have.
bool modules_hold(const pybind11::object& root, const pybind11::list& modules, const pybind11::list& classes,
                  const pybind11::list& names, const pybind11::list& held);

// Tensors as they were. Each is looked at through DLPack: one call for what Python's attributes give in six.
class Tensors {
 public:
  // Raises what DLPack does of a tensor that it cannot show (on no device, sparse), RuntimeError where torch has no such
  // interface.
  explicit Tensors(const pybind11::list& tensors);

  // Whether their shapes, dtypes, devices and flags (requires_grad) are what they were.
  bool kinds_hold(const pybind11::list& tensors) const;

  // Whether their addresses and strides are.
  bool places_hold(const pybind11::list& tensors) const;

 private:
  struct Seen {
    const void* address;
    DLDevice device;
    DLDataType dtype;
    bool requires_grad;
    std::vector<int64_t> shape, strides;
  };

  DLTensor view(PyObject* tensor) const;

  const DLPackExchangeAPI* api_ = nullptr;
  std::vector<Seen> seen_;
};

}  // namespace pcfast::cpu
