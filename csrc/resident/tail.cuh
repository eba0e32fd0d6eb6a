// A layer's tail, from its product to its output: activations and the pool, at one element of the output.
#pragma once

#include "activations.cuh"
#include "products.cuh"
#include "program.h"

namespace pcfast::resident {

// What a thread block works on, and at which iteration.
template <class Real>
struct KernelContext {
  const Program& program;
  const Tensors& tensors;
  const RunParams& run;
  Real* memory;
  int first_sample;  // the block's first sample in the batch
  int samples;       // samples that the block has: the last block may have fewer
  Real eta, momentum;
  int iteration;     // counted from 1
  bool last;         // this is the last iteration: errors go to device memory
  bool moves;        // beliefs move: there are iterations
};

// Returns element `index` of one of the block's samples in a contiguous tensor in device memory, `size` elements per
// sample.
template <class Real>
__device__ Real& global_element(const KernelContext<Real>& ctx, void* tensor, int sample, int size, int index) {
  return static_cast<Real*>(tensor)[int64_t(ctx.first_sample + sample) * size + index];
}
template <class Real>
__device__ Real global_element(const KernelContext<Real>& ctx, const void* tensor, int sample, int size, int index) {
  return static_cast<const Real*>(tensor)[int64_t(ctx.first_sample + sample) * size + index];
}

__device__ inline int offset(const StridedView& view, int sample, int channel, int y, int x) {
  return view.first + sample * view.samples + channel * view.channels + y * view.rows + x * view.columns;
}

// Returns the velocity of element `index` of layer l's beliefs; for layer 1 in Gram form (fact 7), of S.
template <class Real>
__device__ Real& velocity(const KernelContext<Real>& ctx, int l, int sample, int index) {
  const Layer& layer = ctx.program.layers[l - 1];
  return ctx.memory[layer.velocity + sample * layer.velocity_sample + index];
}

template <class Real>
__device__ void record_nonfinite(const KernelContext<Real>& ctx, int layer, Real value) {
  if (!(value - value == Real(0))) atomicMin(ctx.tensors.first_bad + layer - 1, ctx.iteration);
}

// One element of a layer's output.
struct Element {
  int channel, y, x;
  int index;  // packed
};

__device__ inline Element element_at(const Layer& layer, int index) {
  const int channel = quotient(index, layer.by_area), position = index - channel * layer.by_area.value;
  const int y = quotient(position, layer.by_width);
  return {channel, y, position - y * layer.by_width.value, index};
}

__device__ inline int offset(const StridedView& view, int sample, const Element& element) {
  return offset(view, sample, element.channel, element.y, element.x);
}

// Calls work(element, first, end) with a range of samples for all elements of a layer's output that fall to this thread. An
// element's offset is computed once per group of samples. `item` is the thread's first item, and counts on to the next
// layer.
template <class Real, class Work>
__device__ void for_each_element(const KernelContext<Real>& ctx, const Layer& layer, int& item, int threads,
                                 const Work& work) {
  for (; item < layer.items; item += threads) {
    const int group = quotient(item, layer.by_items), index = item - group * layer.by_items.value;
    if (index >= layer.size) continue;
    const Element element = element_at(layer, index);
    const int first = group * ctx.program.group;
    work(element, first, min(first + ctx.program.group, ctx.samples));
  }
  item -= layer.items;
}

// Returns mu - vhat and the derivative of the activation behind the pool.
template <class Real>
__device__ ActDiff<Real> activate_after_pool(const Layer& layer, Real base, Real difference) {
  return act_diff_and_derivative(base, difference, layer.after, layer.after_negative_slope);
}

// One element of the pooling window, as a position in the product's output.
struct Source {
  int y, x;
  int index;  // packed
};

// The tail of a layer at one element of a sample's output. Pre-activations are uhat, plus the product if it has moved.
template <class Real>
struct Tail {
  const Layer& layer;
  const Real* memory;
  bool moved;
  const Element& element;
  int sample;

  __device__ Source source(int k) const {
    if (layer.pool == kNoPool) return {element.y, element.x, element.index};
    const int row = quotient(k, layer.by_window_x);
    const int y = element.y * layer.window_y + row, x = element.x * layer.window_x + (k - row * layer.window_x);
    return {y, x, (element.channel * layer.height + y) * layer.width + x};
  }
  __device__ Real uhat(int source) const {
    return memory[layer.uhat + sample * layer.uhat_sample + source];
  }
  __device__ Real s(int source) const {
    return moved ? reduce_partials(Partials(layer.predict), first_partial(layer.predict, memory, sample, source)) : Real(0);
  }
  __device__ ActDiff<Real> activate_before_pool(int k) const {
    const int at = source(k).index;
    return act_diff_and_derivative(uhat(at), s(at), layer.before, layer.before_negative_slope);
  }
  __device__ int window() const { return layer.window_y * layer.window_x; }

  __device__ Real activated(int k) const {
    return activate(uhat(source(k).index), layer.before, layer.before_negative_slope);
  }
  // Returns the pool's output in the forward pass. In a maximum NaN wins, as in PyTorch.
  __device__ Real pooled() const {
    Real result = activated(0);
    PCFAST_NO_UNROLL
    for (int k = 1; k < window(); ++k) {
      const Real other = activated(k);
      if (layer.pool == kAvgPool)
        result += other;
      else if (other > result || other != other)
        result = other;
    }
    return layer.pool == kAvgPool ? result / window() : result;
  }
  // Returns vhat.
  __device__ Real value() const {
    return activate(layer.pool == kNoPool ? uhat(element.index) : pooled(), layer.after, layer.after_negative_slope);
  }

  // Returns mu - vhat and the derivative of a pooled element, and the maximum's position in the window as `winner`.
  __device__ ActDiff<Real> evaluate(int& winner) const {
    winner = 0;
    const Real base = pooled();
    Real difference = 0;
    PCFAST_NO_UNROLL
    for (int k = 0; k < window(); ++k) {
      const Real moved = activate_before_pool(k).act_diff;
      // max_k((v_k - v_highest) + moved_k): the first wins a tie, NaN wins always, as in PyTorch
      // deviation form (fact 8): where v_highest is a product, contraction would leave its rounding error
      const Real relative = tile::subtract_rn(activated(k), base) + moved;
      if (layer.pool == kAvgPool) {
        difference += moved;
      } else if (k == 0 || relative > difference || (relative != relative && difference == difference)) {
        difference = relative;
        winner = k;
      }
    }
    if (layer.pool == kAvgPool) difference /= window();
    return activate_after_pool(layer, base, difference);
  }

  // Returns the part of an error behind the pool's activation that reaches element k of the window.
  __device__ Real share(int k, Real error, int winner) const {
    if (layer.pool == kMaxPool && k != winner) return Real(0);
    return (layer.pool == kMaxPool ? error : error / window()) * activate_before_pool(k).derivative;
  }
};

}  // namespace pcfast::resident
