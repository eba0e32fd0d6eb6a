// Modules and tensors are asked through Python's own interface: this file knows no torch, and keeps nothing.
#include "modules.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace {

py::object owned(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

PyObject* interned(const char* text) { return owned(PyUnicode_InternFromString(text)).release().ptr(); }

PyObject* const kForward = interned("forward");
PyObject* const kHooks[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                            interned("_backward_pre_hooks")};
PyObject* const kHeld[] = {interned("_parameters"), interned("_buffers"), interned("_modules")};
PyObject* const kRequiresGrad = interned("requires_grad");

// A dictionary among a module's attributes, borrowed. Raises KeyError where there is none.
PyObject* dictionary(const py::object& attributes, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(attributes.ptr(), name);
  if (value == nullptr || !PyDict_Check(value)) {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, name);
    throw py::error_already_set();
  }
  return value;
}

bool equal(PyObject* a, PyObject* b) {
  if (a == b) return true;
  const int result = PyObject_RichCompareBool(a, b, Py_EQ);
  if (result < 0) throw py::error_already_set();
  return result == 1;
}

// The lists of a ModuleState, and how far they have been compared.
struct Expected {
  PyObject *classes, *names, *held;
  Py_ssize_t module = 0, dict = 0, value = 0;
};

// Whether a dictionary has the next names and values.
bool holds_items(PyObject* dict, Expected& expected) {
  if (expected.dict >= PyList_GET_SIZE(expected.names)) return false;
  PyObject* names = PyList_GET_ITEM(expected.names, expected.dict++);
  const Py_ssize_t count = PyTuple_GET_SIZE(names);
  if (PyDict_GET_SIZE(dict) != count || expected.value + count > PyList_GET_SIZE(expected.held)) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    if (i == count || value != PyList_GET_ITEM(expected.held, expected.value++)) return false;
    if (!equal(key, PyTuple_GET_ITEM(names, i))) return false;
  }
  return true;
}

bool module_holds(PyObject* module, Expected& expected) {
  PyObject* kind = PyList_GET_ITEM(expected.classes, expected.module++);
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return false;
  const py::object attributes = owned(PyObject_GenericGetDict(module, nullptr));
  const int patched = PyDict_Contains(attributes.ptr(), kForward);
  if (patched < 0) throw py::error_already_set();
  if (patched) return false;
  for (PyObject* name : kHooks) {
    if (PyDict_GET_SIZE(dictionary(attributes, name))) return false;
  }
  for (PyObject* name : kHeld) {
    if (!holds_items(dictionary(attributes, name), expected)) return false;
  }
  return true;
}

bool requires_grad(PyObject* tensor) { return owned(PyObject_GetAttr(tensor, kRequiresGrad)).ptr() == Py_True; }

}  // namespace

namespace pcfast::cpu {

bool modules_hold(const py::object& root, const py::list& modules, const py::list& classes, const py::list& names,
                  const py::list& held) {
  Expected expected{classes.ptr(), names.ptr(), held.ptr()};
  if (classes.size() != modules.size() + 1) return false;
  if (!module_holds(root.ptr(), expected)) return false;
  for (py::handle module : modules) {
    if (!module_holds(module.ptr(), expected)) return false;
  }
  return true;
}

Tensors::Tensors(const py::list& tensors) {
  for (py::handle tensor : tensors) {
    if (api_ == nullptr) {
      const py::capsule api = py::type::of(tensor).attr(kExchangeApiAttribute);
      api_ = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), kExchangeApiCapsule));
      if (api_ == nullptr) throw py::error_already_set();
      if (api_->version.major != kExchangeApiMajor || api_->dltensor_from_py_object_no_sync == nullptr) {
        throw std::runtime_error("torch's DLPack interface is of another version, or shows no tensors");
      }
    }
    const DLTensor now = view(tensor.ptr());
    seen_.push_back({now.data, now.device, now.dtype, requires_grad(tensor.ptr()),
                     {now.shape, now.shape + now.ndim}, {now.strides, now.strides + now.ndim}});
  }
}

DLTensor Tensors::view(PyObject* tensor) const {
  DLTensor result;
  if (api_->dltensor_from_py_object_no_sync(tensor, &result)) throw py::error_already_set();
  return result;
}

bool Tensors::kinds_hold(const py::list& tensors) const {
  if (tensors.size() != seen_.size()) return false;
  for (size_t i = 0; i < seen_.size(); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    const DLTensor now = view(tensor);
    const Seen& seen = seen_[i];
    if (now.device.device_type != seen.device.device_type || now.device.device_id != seen.device.device_id) return false;
    if (now.dtype.code != seen.dtype.code || now.dtype.bits != seen.dtype.bits) return false;
    if (!std::equal(now.shape, now.shape + now.ndim, seen.shape.begin(), seen.shape.end())) return false;
    if (requires_grad(tensor) != seen.requires_grad) return false;
  }
  return true;
}

bool Tensors::places_hold(const py::list& tensors) const {
  if (tensors.size() != seen_.size()) return false;
  for (size_t i = 0; i < seen_.size(); ++i) {
    const DLTensor now = view(PyList_GET_ITEM(tensors.ptr(), i));
    const Seen& seen = seen_[i];
    if (now.data != seen.address) return false;
    if (!std::equal(now.strides, now.strides + now.ndim, seen.strides.begin(), seen.strides.end())) return false;
  }
  return true;
}

}  // namespace pcfast::cpu
