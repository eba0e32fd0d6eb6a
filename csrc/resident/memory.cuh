// Between device memory and a block's shared memory, before the forward pass, before the iterations and after them.
#pragma once

#include "../tile/barrier.cuh"
#include "output.cuh"

namespace pcfast::resident {

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

// Everything that stays for the whole relaxation; vhat_1 goes where layer 2 reads d_1, or in Gram form uhat_2 to its place.
template <class Real>
__device__ void fill(const Moment<Real>& now, int thread, int threads, const Warp& warp) {
  const Program& program = now.program;
  Real* memory = now.memory;
  for (int i = thread; i < program.elements; i += threads) memory[i] = Real(0);
  tile::block_barrier();
  for (int l = 2; l <= program.depth; ++l)
    fill_weights(program.layers[l - 1], now.tensors.weight[l - 1], memory, thread, threads);
  if (now.tensors.uhat_2) {
    const Layer& layer = program.layers[1];
    const int inner = layer.channels * layer.height * layer.width;
    const Real* uhat = row_of<Real>(now.tensors.uhat_2, now.first_sample, inner);
    for (int i = thread; i < now.samples * inner; i += threads)
      memory[layer.uhat + i / inner * layer.uhat_sample + i % inner] = uhat[i];
  }
  if (now.tensors.vhat_1) {
    const Layer& layer = program.layers[0];
    const int size = layer.by_size.value;
    const Real* vhat = row_of<Real>(now.tensors.vhat_1, now.first_sample, size);
    for (int e = thread; e < now.samples * size; e += threads) {
      const Element<Real> where = element<Real>(layer, e);
      memory[at(layer.d, where.sample, where.channel, where.y, where.x)] = vhat[e];
    }
  }
  fill_targets(now, thread, threads, warp);
  tile::block_barrier();
}

// From vhat, which the forward pass left in its place, to d: zero, or what the caller's beliefs are off it.
template <class Real>
__device__ void begin_beliefs(const Moment<Real>& now, int thread, int threads) {
  const Program& program = now.program;
  for (int l = program.first_in_loop; l < program.depth; ++l) {
    const Layer& layer = program.layers[l - 1];
    const int size = layer.by_size.value;
    const void* start = now.tensors.start[l - 1];
    for (int e = thread; e < now.samples * size; e += threads) {
      const Element<Real> where = element<Real>(layer, e);
      Real& d = now.memory[at(layer.d, where.sample, where.channel, where.y, where.x)];
      d = start ? row_of<Real>(start, now.first_sample, size)[e] - d : Real(0);
    }
  }
}

// What the loop leaves.
template <class Real>
__device__ void store(const Moment<Real>& now, int thread, int threads) {
  const Program& program = now.program;
  for (int l = program.first_in_loop; l < program.depth; ++l) {
    const Layer& layer = program.layers[l - 1];
    const int size = layer.by_size.value;
    const void* forward = l == 1 ? now.tensors.vhat_1 : now.tensors.vhat[l - 1];
    const Real* vhat = row_of<Real>(forward, now.first_sample, size);
    Real* belief = row_of<Real>(now.tensors.belief[l - 1], now.first_sample, size);
    for (int e = thread; e < now.samples * size; e += threads) {
      const Element<Real> where = element<Real>(layer, e);
      belief[e] = vhat[e] + now.memory[at(layer.d, where.sample, where.channel, where.y, where.x)];
    }
  }
  const Layer& gram = program.layers[1];
  if (!gram.gram) return;
  const int area = gram.height * gram.width, inner = gram.channels * area;
  Real* sum = row_of<Real>(now.tensors.gram_sum, now.first_sample, inner);
  for (int i = thread; i < now.samples * inner; i += threads)
    sum[i] = now.memory[at(gram.delta, i / inner, i % inner / area, i % area / gram.width, i % gram.width)];
}

}  // namespace pcfast::resident
