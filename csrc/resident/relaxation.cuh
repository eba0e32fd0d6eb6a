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
  // that the loop reads from the constant bank. An enum of the phases and functions for parts of the loop cost a small
  // network up to 0.7 % of an iteration's instructions, so phases are two named conditions.
  for (int t = 2 - depth;; ++t) {
    const bool forward = t <= 0;         // one layer of the forward pass; its last pass initializes beliefs and loss too
    const bool finish = t > iterations;  // after the iterations: pulls the last errors back at the last beliefs
    const int forward_l = depth + t;     // the layer of a pass of the forward pass
    ctx.iteration = t;
    ctx.last = t == iterations;
    if (tensors.step_sizes && t > 0 && t <= run.iterations) ctx.eta = static_cast<const Real*>(tensors.step_sizes)[t - 1];
    // Active front (fact 3): the lowest layer with an error, and the lowest whose prediction has moved. Below it beliefs,
    // and so predictions, are where they were.
    const int lowest_error = fresh ? max(depth - t + 1 + finish, 2) : 2;
    const int lowest_moved = fresh ? max(depth - t + 2, 2) : 2;

    // Predict stage: products s = W d, then errors and deltas.
    const int highest = forward ? forward_l : depth;
    // in Gram form (fact 7) layer 2's product comes from torch: depth + 1 leaves it out
    const int lowest = !forward ? lowest_moved : program.layers[forward_l - 1].gram ? depth + 1 : forward_l;
    products<Stage::kPredict>(program, ctx.memory, highest, lowest, ctx.samples, warp);
    __syncthreads();
    if (forward) {
      forward_values(ctx, forward_l, thread, threads);
      __syncthreads();
      if (t < 0) continue;  // the next layer
      init_beliefs(ctx, thread, threads);
    }
    if (!finish) output_error(ctx, forward, !forward && depth >= lowest_moved, warp);
    if (forward) {
      __syncthreads();
      continue;
    }
    // the output layer's warps compute its error meanwhile
    const int free = finish || warp.count == 1 ? threads : threads - output_warps(program) * kWarpSize;
    int item = thread;
    for (int l = depth - !finish; l >= lowest_error && thread < free; --l)
      hidden_errors(ctx, l, l >= lowest_moved, finish, item, free);
    if (finish) break;
    __syncthreads();
    // Feedback stage: products r = W^T delta, then d -= eta r.
    if (ctx.moves) {
      // beliefs move from the layer below the active front on; in Gram form (fact 7) layer 1's have moved with S
      const int moving = max(fresh ? depth - t : 1, program.first_in_loop);
      products<Stage::kFeedback>(program, ctx.memory, depth, moving + 1, ctx.samples, warp);
      __syncthreads();
      item = thread;
      for (int l = depth - 1; l >= moving; --l) update_beliefs(ctx, l, item, threads);
      __syncthreads();
    }
    if (ctx.last && !tensors.local_error[depth - 1]) break;
  }
  store_results(ctx, thread, threads);
}

}  // namespace pcfast::resident
