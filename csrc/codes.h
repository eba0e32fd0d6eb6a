// Codes of activations, pools and losses, as kernels/codes.py hands them to the kernels of CPUs and of CUDA.
#pragma once

#include <cstdint>

namespace pcfast {

enum Activation : int32_t {
  kIdentity = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kTanh = 3,
  kSigmoid = 4,
  kSilu = 5,
  kGelu = 6,
  kGeluTanh = 7,
};

enum PoolKind : int32_t { kNoPool = 0, kMaxPool = 1, kAvgPool = 2 };

enum LossKind : int32_t { kCrossEntropy = 0, kMse = 1 };

}  // namespace pcfast
