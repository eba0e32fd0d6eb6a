// The part of DLPack's C interface (version 1) that looks at a tensor of Python without taking hold of it:
// https://dmlc.github.io/dlpack/latest/c_api.html. Names are DLPack's; what is unused here is a void*.
#pragma once

#include <cstdint>

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// `shape` and `strides` (in elements) belong to the tensor.
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // may be null; 0, or -1 with an exception set
  void* current_work_stream;
};

constexpr const char* kExchangeApiAttribute = "__dlpack_c_exchange_api__";  // of the tensors' class, a capsule
constexpr const char* kExchangeApiCapsule = "dlpack_exchange_api";
constexpr uint32_t kExchangeApiMajor = 1;
