// n iterations of strict relaxation in one launch: a block has its samples to itself, and blocks never wait for each other.
#pragma once

#include "../tile/barrier.cuh"
#include "../tile/platform.cuh"
#include "pointwise.cuh"
#include "products.cuh"
#include "program.h"

namespace pcfast::resident {

// Most threads of a block; fewer are possible.
constexpr int kMostThreads = 512;

// One layer's weights, rounded as its products read them, into shared memory.
template <class Real>
__device__ void fill_weights(const Layer& layer, const void* from, Real* memory, int thread, int threads) {
  const int inputs = layer.weight_inputs;
  for (int i = thread; i < inputs * layer.channels; i += threads) {
    const int place = i % inputs * layer.weight_stride + i / inputs;
    if constexpr (sizeof(Real) == sizeof(float)) {
      if (layer.operand == BF16) {
        const tile::bf16 weight = static_cast<const tile::bf16*>(from)[i];
        if (layer.predict.kind == LINEAR)
          reinterpret_cast<tile::bf16*>(memory + layer.weights)[place] = weight;
        else
          memory[layer.weights + place] = tile::to_float(weight);
        continue;
      }
      if (layer.operand == TF32) {
        memory[layer.weights + place] = tile::as_float(tile::to_tf32(static_cast<const float*>(from)[i]));
        continue;
      }
    }
    memory[layer.weights + place] = static_cast<const Real*>(from)[i];
  }
  if constexpr (sizeof(Real) == sizeof(float)) {
    for (int k = thread; k < layer.predict.term_count; k += threads) write_term(layer.predict, memory, k);
    for (int k = thread; k < layer.feedback.term_count; k += threads) write_term(layer.feedback, memory, k);
  }
}

// Everything that stays for the whole relaxation, into shared memory.
template <class Real>
__device__ void fill(const Moment<Real>& now, int thread, int threads) {
  const Program& program = now.program;
  Real* memory = now.memory;
  for (int i = thread; i < program.elements; i += threads) memory[i] = Real(0);
  tile::block_barrier();
  for (int l = 1; l <= program.depth; ++l) {
    const Layer& layer = program.layers[l - 1];
    fill_weights(layer, now.tensors.weight[l - 1], memory, thread, threads);
    if (layer.uhat_sample) {
      const int inner = layer.channels * layer.height * layer.width;
      const Real* uhat = row_of<Real>(now.tensors.uhat[l - 1], now.first_sample, inner);
      for (int i = thread; i < now.samples * inner; i += threads)
        memory[layer.uhat + i / inner * layer.uhat_sample + i % inner] = uhat[i];
    }
    if (now.tensors.start[l - 1]) {
      const int size = layer.channels * layer.pooled_height * layer.pooled_width;
      const Real* start = row_of<Real>(now.tensors.start[l - 1], now.first_sample, size);
      for (int e = thread; e < now.samples * size; e += threads) {
        const Element<Real> where = element<Real>(layer, e);
        memory[at(layer.d, where.sample, where.channel, where.y, where.x)] = start[e];
      }
    }
  }
  const int classes = program.classes;
  const Real* vhat = row_of<Real>(now.tensors.vhat, now.first_sample, classes);
  const Real* dense = row_of<Real>(now.tensors.dense, now.first_sample, classes);
  for (int i = thread; i < now.samples * classes; i += threads) {
    const int place = i / classes * program.classes_stride + i % classes;
    memory[program.vhat + place] = vhat[i];
    memory[program.dense + place] = dense[i];
  }
  if (now.tensors.mass)
    for (int n = thread; n < now.samples; n += threads)
      memory[program.mass + n] = row_of<Real>(now.tensors.mass, now.first_sample, 1)[n];
  tile::block_barrier();
}

// What the loop leaves, into device memory.
template <class Real>
__device__ void store(const Moment<Real>& now, int thread, int threads) {
  const Program& program = now.program;
  for (int l = program.first_in_loop; l < program.depth; ++l) {
    const Layer& layer = program.layers[l - 1];
    const int64_t size = int64_t(layer.channels) * layer.pooled_height * layer.pooled_width;
    Real* d = static_cast<Real*>(now.tensors.d[l - 1]) + now.first_sample * size;
    for (int e = thread; e < now.samples * size; e += threads) {
      const Element<Real> where = element<Real>(layer, e);
      d[e] = now.memory[at(layer.d, where.sample, where.channel, where.y, where.x)];
    }
  }
  const Layer& gram = program.layers[1];
  if (!gram.gram) return;
  const int area = gram.height * gram.width, inner = gram.channels * area;
  Real* sum = static_cast<Real*>(now.tensors.gram_sum) + int64_t(now.first_sample) * inner;
  for (int i = thread; i < now.samples * inner; i += threads)
    sum[i] = now.memory[at(gram.delta, i / inner, i % inner / area, i % area / gram.width, i % gram.width)];
}

template <class Real>
__global__ void __launch_bounds__(kMostThreads, 1)
    relaxation(const __grid_constant__ Program program, const __grid_constant__ Tensors tensors,
               const __grid_constant__ Run run) {
  PCFAST_SHARED_MEMORY(bytes);
  const int thread = threadIdx.x, threads = blockDim.x;
  const Warp warp{thread / kWarpSize, threads / kWarpSize, thread % kWarpSize};
  const int first_sample = blockIdx.x * program.samples;
  Moment<Real> now{program, tensors, reinterpret_cast<Real*>(bytes), first_sample,
                   min(program.samples, run.batch - first_sample), Real(run.eta), Real(run.loss_scale), 0, false,
                   run.iterations > 0};
  fill(now, thread, threads);

  const int depth = program.depth;
  const int iterations = max(run.iterations, 1);
  // One round more finishes: every stage stands once, since each is much code.
  for (int t = 1;; ++t) {
    const bool finish = t > iterations;
    now.iteration = t;
    now.last = t == iterations;
    // The lowest layer with an error, and the lowest whose prediction has moved (fact 3). Below it beliefs are where they
    // were, and so is the prediction.
    const int front = run.fresh ? max(depth - t + 1 + finish, 2) : 2;
    const int moved = run.fresh ? max(depth - t + 2, 2) : 2;
    products<false>(program, now.memory, moved, now.samples, warp);
    tile::block_barrier();
    if (!finish) output_error(now, depth >= moved, warp);
    for (int l = depth - !finish; l >= front; --l) pull_errors(now, l, l >= moved, finish, thread, threads);
    if (finish) break;
    tile::block_barrier();
    if (now.moves) {
      // beliefs from front - 1 on move; in Gram form layer 1's have done so with S
      const int lowest = max(run.fresh ? depth - t : 1, program.first_in_loop);
      products<true>(program, now.memory, lowest + 1, now.samples, warp);
      tile::block_barrier();
      for (int l = depth - 1; l >= lowest; --l) update(now, l, thread, threads);
      tile::block_barrier();
    }
    if (now.last && !tensors.local_error[depth - 1]) break;
  }
  store(now, thread, threads);
}

}  // namespace pcfast::resident
