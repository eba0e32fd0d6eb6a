// Strict relaxation in one launch: a forward pass, n iterations and the finish. A thread block has its samples to itself,
// and blocks never wait for each other.
#pragma once

#include "../tile/platform.cuh"
#include "memory.cuh"
#include "output.cuh"
#include "pointwise.cuh"
#include "products.cuh"
#include "program.h"

namespace pcfast::resident {

// What one pass of the loop of `relaxation` does.
enum class Phase {
  kForward,  // one layer of the forward pass; the last pass of it also initializes beliefs and loss
  kIterate,  // one iteration: predict stage, then feedback stage
  kFinish,   // the last errors, pulled back at the last beliefs, go to device memory for the weight gradients
};

// Layers that are active in a pass. Below the active front (fact 3) beliefs are where they were, and so are their
// predictions.
struct ActiveLayers {
  int lowest_error;       // the lowest layer whose error is not zero
  int lowest_prediction;  // the lowest layer whose prediction has moved

  __device__ ActiveLayers(const Program& program, bool fresh, int t, bool finish)
      : lowest_error(fresh ? max(program.depth - t + 1 + finish, 2) : 2),
        lowest_prediction(fresh ? max(program.depth - t + 2, 2) : 2) {}
};

// Computes errors and deltas of the hidden layers from the products of the predict stage; in kFinish, of all layers.
template <class Real>
__device__ void pull_errors(const KernelContext<Real>& ctx, const ActiveLayers& active, bool finish, const Warp& warp,
                            int thread, int threads) {
  // the output layer's warps compute its error meanwhile
  const int free = finish || warp.count == 1 ? threads : threads - output_warps(ctx.program) * kWarpSize;
  int item = thread;
  for (int l = ctx.program.depth - !finish; l >= active.lowest_error && thread < free; --l)
    hidden_errors(ctx, l, l >= active.lowest_prediction, finish, item, free);
}

// Runs the feedback stage of iteration t: products r = W^T delta, then d -= eta r.
template <class Real>
__device__ void feedback(const KernelContext<Real>& ctx, bool fresh, int t, const Warp& warp, int thread, int threads) {
  const int depth = ctx.program.depth;
  // beliefs move from the layer below the active front (fact 3) on; in Gram form (fact 7) layer 1's have moved with S
  const int lowest = max(fresh ? depth - t : 1, ctx.program.first_in_loop);
  products<Stage::kFeedback>(ctx.program, ctx.memory, depth, lowest + 1, ctx.samples, warp);
  __syncthreads();
  int item = thread;
  for (int l = depth - 1; l >= lowest; --l) update_beliefs(ctx, l, item, threads);
  __syncthreads();
}

template <class Real>
__global__ void __launch_bounds__(kMaxThreads, 1)
    relaxation(const __grid_constant__ Program program, const __grid_constant__ Tensors tensors,
               const __grid_constant__ RunParams run) {
  PCFAST_SHARED_MEMORY(bytes);
  const int thread = threadIdx.x, threads = blockDim.x;
  const Warp warp{thread / kWarpSize, threads / kWarpSize, thread % kWarpSize};
  const int first_sample = blockIdx.x * program.samples;
  KernelContext<Real> ctx{program, tensors, run, tile::SharedPointer<Real>(reinterpret_cast<Real*>(bytes)), first_sample,
                          min(program.samples, run.batch - first_sample), Real(run.eta), Real(run.momentum), 0, false,
                          run.iterations > 0};
  load_block_state(ctx, thread, threads, warp);

  const int depth = program.depth;
  const int iterations = max(run.iterations, 1);
  const bool fresh = run.fresh != 0;
  // One loop over phases, not three calls `forward(); iterate(); finish();`, which all need the predict stage's products:
  // most of the kernel's code. Inlined three times nvcc 13.0 does not compile them within ten minutes (the loop: twenty
  // seconds). Out of line, for sm_80, the context takes a stack of 80 bytes, and 1,246 generic loads read the arguments
  // that the loop reads from the constant bank.
  for (int t = 2 - depth;; ++t) {
    const Phase phase = t <= 0 ? Phase::kForward : t <= iterations ? Phase::kIterate : Phase::kFinish;
    const bool forward = phase == Phase::kForward, finish = phase == Phase::kFinish;
    const int forward_l = depth + t;  // the layer of a pass of kForward
    ctx.iteration = t;
    ctx.last = t == iterations;
    if (tensors.step_sizes && t > 0 && t <= run.iterations) ctx.eta = static_cast<const Real*>(tensors.step_sizes)[t - 1];
    const ActiveLayers active(program, fresh, t, finish);

    const int highest = forward ? forward_l : depth;
    // in Gram form (fact 7) layer 2's product comes from torch: depth + 1 leaves it out
    const int lowest = !forward ? active.lowest_prediction
                       : program.layers[forward_l - 1].gram ? depth + 1 : forward_l;
    products<Stage::kPredict>(program, ctx.memory, highest, lowest, ctx.samples, warp);
    __syncthreads();
    if (forward) {
      forward_values(ctx, forward_l, thread, threads);
      __syncthreads();
      if (t < 0) continue;  // the next layer
      init_beliefs(ctx, thread, threads);
    }
    if (!finish) output_error(ctx, forward, !forward && depth >= active.lowest_prediction, warp);
    if (forward) {
      __syncthreads();
      continue;
    }
    pull_errors(ctx, active, finish, warp, thread, threads);
    if (finish) break;
    __syncthreads();
    if (ctx.moves) feedback(ctx, fresh, t, warp, thread, threads);
    if (ctx.last && !tensors.local_error[depth - 1]) break;
  }
  store_results(ctx, thread, threads);
}

}  // namespace pcfast::resident
