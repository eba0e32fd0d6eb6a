// Copies between device memory and a block's shared memory: before the forward pass, before the iterations and after them.
#pragma once

#include "output.cuh"

namespace pcfast::resident {

// Loads per thread in flight: a block has few warps to hide the latency of device memory.
constexpr int kLoadsAhead = 8;

// Returns weight i in device memory, rounded as the layer's products read it.
template <class Real>
__device__ Real load_weight(const Layer& layer, const void* from, int i) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (layer.operand == kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    if (layer.operand == kTf32) return __uint_as_float(tile::to_tf32(static_cast<const float*>(from)[i]));
  }
  return static_cast<const Real*>(from)[i];
}

template <class Real>
__device__ void store_weight(const Layer& layer, Real* memory, int index, Real weight) {
  if (layer.gram) weight = -weight;
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (layer.operand == kBf16 && layer.predict.kind == kLinear) {
      reinterpret_cast<__nv_bfloat16*>(memory + layer.weights)[index] = __float2bfloat16_rn(weight);
      return;
    }
  }
  memory[layer.weights + index] = weight;
}

__device__ inline void write_terms(const Layer& layer, const Product& product, float* memory, int thread, int threads) {
  for (int slot = thread; slot < product.term_count; slot += threads)
    if (layer.operand == kBf16)
      write_term<Bf16>(product, memory, slot);
    else
      write_term<Tf32>(product, memory, slot);
}

// Copies one layer's weights, from [output][input] to [input][padded output], and writes the tables of its products.
template <class Real>
__device__ void load_weights(const Layer& layer, const void* from, Real* memory, int thread, int threads) {
  const int inputs = layer.weight_inputs, count = inputs * layer.channels;
  if (count) {
    // weight i = output * inputs + input: indices advance by addition, without a division per weight
    int input = thread % inputs, output = thread / inputs;
    const int input_step = threads % inputs, output_step = threads / inputs;
    for (int i = thread; i < count; i += kLoadsAhead * threads) {
      Real weight[kLoadsAhead];
      PCFAST_UNROLL
      for (int j = 0; j < kLoadsAhead; ++j)
        if (i + j * threads < count) weight[j] = load_weight<Real>(layer, from, i + j * threads);
      PCFAST_UNROLL
      for (int j = 0; j < kLoadsAhead; ++j) {
        if (i + j * threads < count) store_weight(layer, memory, input * layer.weight_stride + output, weight[j]);
        input += input_step;
        output += output_step;
        if (input >= inputs) input -= inputs, ++output;
      }
    }
  }
  if constexpr (sizeof(Real) == sizeof(float)) {
    write_terms(layer, layer.predict, memory, thread, threads);
    write_terms(layer, layer.feedback, memory, thread, threads);
  }
}

// Loads what stays in shared memory for the whole relaxation. The block sees it on return, but the target sums only after
// one more barrier. vhat_1 goes where layer 2 reads d_1; in Gram form (fact 7) uhat_2 is loaded instead.
template <class Real>
__device__ void load_block_state(const KernelContext<Real>& ctx, int thread, int threads, const Warp& warp) {
  const Program& program = ctx.program;
  Real* memory = ctx.memory;
  for (int i = thread; i < program.elements; i += threads) memory[i] = Real(0);
  __syncthreads();
  for (int l = 2; l <= program.depth; ++l)
    load_weights(program.layers[l - 1], ctx.tensors.weight[l - 1], memory, thread, threads);
  if (ctx.tensors.uhat_2) {
    const Layer& layer = program.layers[1];
    const int inner = layer.channels * layer.height * layer.width;
    for (int i = thread; i < ctx.samples * inner; i += threads)
      memory[layer.uhat + i / inner * layer.uhat_sample + i % inner] = global_element(ctx, ctx.tensors.uhat_2, 0, inner, i);
  }
  if (ctx.tensors.vhat_1) {
    const Layer& layer = program.layers[0];
    int item = thread;
    for_each_element(ctx, layer, item, threads, [&](const Element& element, int first, int end) {
      for (int sample = first; sample < end; ++sample)
        memory[offset(layer.d, sample, element)] =
            global_element(ctx, ctx.tensors.vhat_1, sample, layer.size, element.index);
    });
  }
  load_targets(ctx, thread, threads, warp);
}

// Replaces vhat, which the forward pass left in d's place, with d: zero, or the caller's beliefs minus vhat.
template <class Real>
__device__ void init_beliefs(const KernelContext<Real>& ctx, int thread, int threads) {
  const Program& program = ctx.program;
  int item = thread;
  for (int l = program.first_in_loop; l < program.depth; ++l) {
    const Layer& layer = program.layers[l - 1];
    const void* start = ctx.tensors.start[l - 1];
    for_each_element(ctx, layer, item, threads, [&](const Element& element, int first, int end) {
      for (int sample = first; sample < end; ++sample) {
        Real& d = ctx.memory[offset(layer.d, sample, element)];
        d = start ? global_element(ctx, start, sample, layer.size, element.index) - d : Real(0);
      }
    });
  }
}

// Stores what the loop leaves: beliefs, and S of the Gram form (fact 7).
template <class Real>
__device__ void store_results(const KernelContext<Real>& ctx, int thread, int threads) {
  const Program& program = ctx.program;
  int item = thread;
  for (int l = program.first_in_loop; l < program.depth; ++l) {
    const Layer& layer = program.layers[l - 1];
    const void* vhat = l == 1 ? ctx.tensors.vhat_1 : ctx.tensors.vhat[l - 1];
    for_each_element(ctx, layer, item, threads, [&](const Element& element, int first, int end) {
      for (int sample = first; sample < end; ++sample)
        global_element(ctx, ctx.tensors.belief[l - 1], sample, layer.size, element.index) =
            global_element(ctx, vhat, sample, layer.size, element.index) + ctx.memory[offset(layer.d, sample, element)];
    });
  }
  const Layer& gram = program.layers[1];
  if (!gram.gram) return;
  const int area = gram.height * gram.width, inner = gram.channels * area;
  for (int i = thread; i < ctx.samples * inner; i += threads) {
    const int at = offset(gram.delta, i / inner, i % inner / area, i % area / gram.width, i % gram.width);
    global_element(ctx, ctx.tensors.gram_sum, 0, inner, i) = ctx.memory[at];
  }
}

}  // namespace pcfast::resident
