// The CUDA names that kernel source uses, for a C++20 compiler.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda_intrinsics.h"
#include "launch.h"
#include "threads.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// The promise holds for one GPU thread, but g++ would rely on it across barriers, where other threads write.
#define __restrict__

#define threadIdx (::pcfast::host::this_thread().index)
#define blockIdx (::pcfast::host::this_thread().block->index)
#define blockDim (::pcfast::host::current_grid->block_shape)
#define gridDim (::pcfast::host::current_grid->shape)

using std::max;
using std::min;
