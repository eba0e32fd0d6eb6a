// A layer's tail, from its product to its output: activations and the pool, at one number of the output.
#pragma once

#include "activations.cuh"
#include "products.cuh"
#include "program.h"

namespace pcfast::resident {

// What a block works on, and when.
template <class Real>
struct KernelContext {
  const Program& program;
  const Tensors& tensors;
  const Run& run;
  Real* memory;
  int first_sample;  // of the batch
  int samples;
  Real eta, momentum;
  int iteration;     // from 1 on
  bool last;         // errors go to device memory
  bool moves;        // beliefs move
};

// Number `index` of one of the block's samples in a dense tensor in device memory, `size` numbers a sample.
template <class Real>
__device__ Real& global_element(const KernelContext<Real>& ctx, void* tensor, int sample, int size, int index) {
  return static_cast<Real*>(tensor)[int64_t(ctx.first_sample + sample) * size + index];
}
template <class Real>
__device__ Real global_element(const KernelContext<Real>& ctx, const void* tensor, int sample, int size, int index) {
  return static_cast<const Real*>(tensor)[int64_t(ctx.first_sample + sample) * size + index];
}

__device__ inline int at(const StridedView& place, int sample, int channel, int y, int x) {
  return place.first + sample * place.samples + channel * place.channels + y * place.rows + x * place.columns;
}

// The velocity of number `index` of layer l's beliefs, which has momentum; of S for layer 1 in Gram form.
template <class Real>
__device__ Real& velocity(const KernelContext<Real>& ctx, int l, int sample, int index) {
  const Layer& layer = ctx.program.layers[l - 1];
  return ctx.memory[layer.velocity + sample * layer.velocity_sample + index];
}

template <class Real>
__device__ void record_nonfinite(const KernelContext<Real>& ctx, int layer, Real value) {
  if (!(value - value == Real(0))) atomicMin(ctx.tensors.first_bad + layer - 1, ctx.iteration);
}

// One number of a layer's output.
struct Element {
  int channel, y, x;
  int index;  // packed
};

__device__ inline Element element(const Layer& layer, int index) {
  const int channel = quotient(index, layer.by_area), place = index - channel * layer.by_area.value;
  const int y = quotient(place, layer.by_width);
  return {channel, y, place - y * layer.by_width.value, index};
}

__device__ inline int at(const StridedView& place, int sample, const Element& where) {
  return at(place, sample, where.channel, where.y, where.x);
}

// Calls work(element, first, end), of samples, for all numbers of a layer's output that fall to a thread: where a number
// lies is found once for a group of samples. `item` is the thread's first one, and counts on to the next layer.
template <class Real, class Work>
__device__ void for_each_element(const KernelContext<Real>& ctx, const Layer& layer, int& item, int threads, const Work& work) {
  for (; item < layer.items; item += threads) {
    const int group = quotient(item, layer.by_items), index = item - group * layer.by_items.value;
    if (index >= layer.size) continue;
    const Element where = element(layer, index);
    const int first = group * ctx.program.group;
    work(where, first, min(first + ctx.program.group, ctx.samples));
  }
  item -= layer.items;
}

// mu - vhat and act', of the activation behind the pool.
template <class Real>
__device__ ActDiff<Real> after(const Layer& layer, Real base, Real difference) {
  return act_diff_and_derivative(base, difference, layer.after, layer.after_negative_slope);
}

// One element of the pooling window, in the product's output.
struct Source {
  int y, x;
  int index;  // packed
};

// The tail of a layer at one number of a sample's output: pre-activations come from `uhat` and the product, if it has
// moved.
template <class Real>
struct Tail {
  const Layer& layer;
  const Real* memory;
  bool moved;
  const Element& where;
  int sample;

  __device__ Source source(int k) const {
    if (layer.pool == kNoPool) return {where.y, where.x, where.index};
    const int row = quotient(k, layer.by_window_x);
    const int y = where.y * layer.window_y + row, x = where.x * layer.window_x + (k - row * layer.window_x);
    return {y, x, (where.channel * layer.height + y) * layer.width + x};
  }
  __device__ Real uhat(int source) const {
    return memory[layer.uhat + sample * layer.uhat_sample + source];
  }
  __device__ Real s(int source) const {
    return moved ? reduce_partials(Partials(layer.predict), first_partial(layer.predict, memory, sample, source)) : Real(0);
  }
  __device__ ActDiff<Real> before(int k) const {
    const int at = source(k).index;
    return act_diff_and_derivative(uhat(at), s(at), layer.before, layer.before_negative_slope);
  }
  __device__ int window() const { return layer.window_y * layer.window_x; }

  __device__ Real activated(int k) const {
    return activate(uhat(source(k).index), layer.before, layer.before_negative_slope);
  }
  // What the pool gives in the forward pass; the highest: NaN wins, as in PyTorch.
  __device__ Real pooled() const {
    Real found = activated(0);
    PCFAST_NO_UNROLL
    for (int k = 1; k < window(); ++k) {
      const Real other = activated(k);
      if (layer.pool == kAvgPool)
        found += other;
      else if (other > found || other != other)
        found = other;
    }
    return layer.pool == kAvgPool ? found / window() : found;
  }
  // vhat
  __device__ Real value() const {
    return activate(layer.pool == kNoPool ? uhat(where.index) : pooled(), layer.after, layer.after_negative_slope);
  }

  // Of a pool: mu - vhat, act' behind it, and its winner.
  __device__ ActDiff<Real> evaluate(int& winner) const {
    winner = 0;
    const Real base = pooled();
    Real difference = 0;
    PCFAST_NO_UNROLL
    for (int k = 0; k < window(); ++k) {
      const Real moved = before(k).act_diff;
      // max_k((v_k - v_highest) + moved_k): the first wins a tie, NaN wins always, as in PyTorch
      // where v_highest is a product, contraction would leave its rounding error
      const Real relative = tile::subtract_rn(activated(k), base) + moved;
      if (layer.pool == kAvgPool) {
        difference += moved;
      } else if (k == 0 || relative > difference || (relative != relative && difference == difference)) {
        difference = relative;
        winner = k;
      }
    }
    if (layer.pool == kAvgPool) difference /= window();
    return after(layer, base, difference);
  }

  // What of an error behind the pool's activation reaches element k of the window.
  __device__ Real share(int k, Real error, int winner) const {
    if (layer.pool == kMaxPool && k != winner) return Real(0);
    return (layer.pool == kMaxPool ? error : error / window()) * before(k).derivative;
  }
};

}  // namespace pcfast::resident
