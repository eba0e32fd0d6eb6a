// A forward pass and n iterations of strict relaxation in one launch: a block has its samples to itself, and blocks never
// wait for each other.
#pragma once

#include "../tile/barrier.cuh"
#include "../tile/platform.cuh"
#include "memory.cuh"
#include "output.cuh"
#include "pointwise.cuh"
#include "products.cuh"
#include "program.h"

namespace pcfast::resident {

// Most threads of a block; fewer are possible.
constexpr int kMostThreads = 512;

template <class Real>
__global__ void __launch_bounds__(kMostThreads, 1)
    relaxation(const __grid_constant__ Program program, const __grid_constant__ Tensors tensors,
               const __grid_constant__ Run run) {
  PCFAST_SHARED_MEMORY(bytes);
  const int thread = threadIdx.x, threads = blockDim.x;
  const Warp warp{thread / kWarpSize, threads / kWarpSize, thread % kWarpSize};
  const int first_sample = blockIdx.x * program.samples;
  Moment<Real> now{program, tensors, run, tile::SharedPointer<Real>(reinterpret_cast<Real*>(bytes)), first_sample,
                   min(program.samples, run.batch - first_sample), Real(run.eta), Real(run.momentum), 0, false,
                   run.iterations > 0};
  fill(now, thread, threads, warp);

  const int depth = program.depth;
  const int iterations = max(run.iterations, 1);
  const bool fresh = run.fresh != 0;
  // Rounds: the forward pass layer by layer, the iterations, and one to finish. What they share stands once, since each
  // stage is much code.
  for (int t = 2 - depth;; ++t) {
    const bool forward = t <= 0, finish = t > iterations;
    const int layer = depth + t;  // of the forward pass
    now.iteration = t;
    now.last = t == iterations;
    if (tensors.step_sizes && t > 0 && t <= run.iterations) now.eta = static_cast<const Real*>(tensors.step_sizes)[t - 1];
    // The lowest layer with an error, and the lowest whose prediction has moved (fact 3). Below it beliefs are where they
    // were, and so is the prediction.
    const int front = fresh ? max(depth - t + 1 + finish, 2) : 2;
    const int moved = fresh ? max(depth - t + 2, 2) : 2;
    const int highest = forward ? layer : depth;
    const int lowest = !forward ? moved : program.layers[layer - 1].gram ? depth + 1 : layer;
    products<false>(program, now.memory, highest, lowest, now.samples, warp);
    tile::block_barrier();
    if (forward) {
      forward_values(now, layer, thread, threads);
      tile::block_barrier();
      if (t < 0) continue;
      begin_beliefs(now, thread, threads);
    }
    if (!finish) output_error(now, forward, !forward && depth >= moved, warp);
    if (forward) {
      tile::block_barrier();
      continue;
    }
    // the output layer's warps are busy with it
    const int free = finish || warp.count == 1 ? threads : threads - output_warps(program) * kWarpSize;
    int item = thread;
    for (int l = depth - !finish; l >= front && thread < free; --l)
      pull_errors(now, l, l >= moved, finish, item, free);
    if (finish) break;
    tile::block_barrier();
    if (now.moves) {
      // beliefs from front - 1 on move; in Gram form layer 1's have done so with S
      const int moving = max(fresh ? depth - t : 1, program.first_in_loop);
      products<true>(program, now.memory, depth, moving + 1, now.samples, warp);
      tile::block_barrier();
      item = thread;
      for (int l = depth - 1; l >= moving; --l) update(now, l, item, threads);
      tile::block_barrier();
    }
    if (now.last && !tensors.local_error[depth - 1]) break;
  }
  store(now, thread, threads);
}

}  // namespace pcfast::resident
