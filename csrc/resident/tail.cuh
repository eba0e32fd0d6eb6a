// A layer's tail, from its product to its output: activations and the pool, at one number of the output.
#pragma once

#include "../tile/atomic.cuh"
#include "activations.cuh"
#include "products.cuh"
#include "program.h"

namespace pcfast::resident {

// Of a dense tensor in device memory whose rows are samples.
template <class Real>
__device__ Real* row_of(void* tensor, int64_t row, int64_t size) {
  return static_cast<Real*>(tensor) + row * size;
}
template <class Real>
__device__ const Real* row_of(const void* tensor, int64_t row, int64_t size) {
  return static_cast<const Real*>(tensor) + row * size;
}

// What a block works on, and when.
template <class Real>
struct Moment {
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

__device__ inline int at(const Place& place, int sample, int channel, int y, int x) {
  return place.first + sample * place.samples + channel * place.channels + y * place.rows + x * place.columns;
}

// The velocity of number `index` of layer l's beliefs, which has momentum; of S for layer 1 in Gram form.
template <class Real>
__device__ Real& velocity(const Moment<Real>& now, int l, int sample, int index) {
  const Layer& layer = now.program.layers[l - 1];
  return now.memory[layer.velocity + sample * layer.velocity_sample + index];
}

template <class Real>
__device__ void note_bad(const Moment<Real>& now, int layer, Real value) {
  if (!(value - value == Real(0))) tile::atomic_min(now.tensors.first_bad + layer - 1, now.iteration);
}

// One number of a layer's output: where it is, and how it depends on the product.
template <class Real>
struct Element {
  int sample, channel, y, x;
  int index;  // in the output, packed
};

template <class Real>
__device__ Element<Real> element(const Layer& layer, int e) {
  const int sample = quotient(e, layer.by_size), index = e - sample * layer.by_size.value;
  const int channel = quotient(index, layer.by_area), place = index - channel * layer.by_area.value;
  const int y = quotient(place, layer.by_width);
  return {sample, channel, y, place - y * layer.by_width.value, index};
}

// One element of the pooling window, in the product's output.
struct Source {
  int y, x;
  int index;  // packed
};

// The tail of a layer at one number of its output: pre-activations come from `uhat` and the product, if it has moved.
template <class Real>
struct Tail {
  const Layer& layer;
  const Real* memory;
  bool moved;
  const Element<Real>& where;

  __device__ Source source(int k) const {
    if (layer.pool == NO_POOL) return {where.y, where.x, where.index};
    const int row = quotient(k, layer.by_window_x);
    const int y = where.y * layer.window_y + row, x = where.x * layer.window_x + (k - row * layer.window_x);
    return {y, x, (where.channel * layer.height + y) * layer.width + x};
  }
  __device__ Real uhat(int source) const {
    return memory[layer.uhat + where.sample * layer.uhat_sample + source];
  }
  __device__ Real s(int source) const {
    return moved ? summed(layer.predict, memory, where.sample, source) : Real(0);
  }
  __device__ Moved<Real> before(int k) const {
    const int at = source(k).index;
    return bracket_and_slope(uhat(at), s(at), layer.before, layer.before_negative_slope);
  }
  __device__ Moved<Real> after(Real base, Real difference) const {
    return bracket_and_slope(base, difference, layer.after, layer.after_negative_slope);
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
      if (layer.pool == AVG_POOL)
        found += other;
      else if (other > found || other != other)
        found = other;
    }
    return layer.pool == AVG_POOL ? found / window() : found;
  }
  // vhat
  __device__ Real value() const {
    return activate(layer.pool == NO_POOL ? uhat(where.index) : pooled(), layer.after, layer.after_negative_slope);
  }

  // mu - vhat, act' behind the pool, and the pool's winner.
  __device__ Moved<Real> evaluate(int& winner) const {
    winner = 0;
    Real base, difference = 0;
    if (layer.pool == NO_POOL) {
      base = uhat(where.index);
      difference = s(where.index);
    } else {
      base = pooled();
      PCFAST_NO_UNROLL
      for (int k = 0; k < window(); ++k) {
        const Real moved = before(k).bracket;
        // max_k((v_k - v_highest) + moved_k): the first wins a tie, NaN wins always, as in PyTorch
        const Real relative = (activated(k) - base) + moved;
        if (layer.pool == AVG_POOL) {
          difference += moved;
        } else if (k == 0 || relative > difference || (relative != relative && difference == difference)) {
          difference = relative;
          winner = k;
        }
      }
      if (layer.pool == AVG_POOL) difference /= window();
    }
    return after(base, difference);
  }

  // What of an error behind the pool's activation reaches element k of the window.
  __device__ Real share(int k, Real error, int winner) const {
    if (layer.pool == NO_POOL) return error;
    if (layer.pool == MAX_POOL && k != winner) return Real(0);
    return (layer.pool == MAX_POOL ? error : error / window()) * before(k).slope;
  }
};

}  // namespace pcfast::resident
