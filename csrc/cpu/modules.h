// The comparison of pcfast/model/module_state.py, which every step makes before any tensor work.
#pragma once

#include <pybind11/pybind11.h>

namespace pcfast::cpu {

// Whether a model and its `modules` are of `classes`, have neither hooks nor a forward of their own, and hold `names` and
// `held`: the names of parameters, buffers and children, a tuple each, module by module, and all their values; and
// whether `tensors` have `facts`, tuples of shape, dtype, device and requires_grad. Raises KeyError where a module lacks
// what torch's have.
bool modules_hold(const pybind11::object& root, const pybind11::list& modules, const pybind11::list& classes,
                  const pybind11::list& names, const pybind11::list& held, const pybind11::list& tensors,
                  const pybind11::list& facts);

// Whether `tensors` lie at `places`: tuples of address and strides.
bool places_hold(const pybind11::list& tensors, const pybind11::list& places);

}  // namespace pcfast::cpu
