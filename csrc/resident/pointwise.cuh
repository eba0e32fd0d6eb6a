// Pointwise work of the two stages: threads run over the numbers of the beliefs that a layer gives.
#pragma once

#include "activations.cuh"
#include "products.cuh"
#include "program.h"
#include "../tile/atomic.cuh"
#include "../tile/shuffle.cuh"

namespace pcfast::resident {

// What a block works on, and when.
template <class Real>
struct Moment {
  const Program& program;
  const Tensors& tensors;
  Real* memory;
  int first_sample;  // of the batch
  int samples;
  Real eta, loss_scale;
  int iteration;     // from 1 on
  bool last;         // errors go to device memory
  bool moves;        // beliefs move
};

__device__ inline int at(const Place& place, int sample, int channel, int y, int x) {
  return place.first + sample * place.samples + channel * place.channels + y * place.rows + x * place.columns;
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
  const int area = layer.pooled_height * layer.pooled_width, size = layer.channels * area;
  const int index = e % size, place = index % area;
  return {e / size, index / area, place / layer.pooled_width, place % layer.pooled_width, index};
}

// The tail of a layer at one number of its output: pre-activations come from `uhat` and the product, if it has moved.
template <class Real>
struct Tail {
  const Layer& layer;
  const Real* memory;
  bool moved;
  const Element<Real>& where;

  // packed index of element k of the pooling window
  __device__ int source(int k) const {
    const int y = where.y * layer.window_y + k / layer.window_x, x = where.x * layer.window_x + k % layer.window_x;
    return (where.channel * layer.height + y) * layer.width + x;
  }
  __device__ Real uhat(int source) const {
    return memory[layer.uhat + where.sample * layer.uhat_sample + source];
  }
  __device__ Real s(int source) const {
    return moved ? summed(layer.predict, memory, where.sample, source) : Real(0);
  }
  __device__ Moved<Real> before(int source) const {
    return bracket_and_slope(uhat(source), s(source), layer.before, Real(layer.before_negative_slope));
  }
  __device__ Moved<Real> after(Real base, Real difference) const {
    return bracket_and_slope(base, difference, layer.after, Real(layer.after_negative_slope));
  }
  __device__ int window() const { return layer.window_y * layer.window_x; }

  // mu - vhat, act' behind the pool, and the pool's winner. Each activation stands once: they are most of the kernel's code.
  __device__ Moved<Real> evaluate(int& winner) const {
    winner = 0;
    Real base = uhat(source(0)), difference = s(source(0));
    if (layer.pool != NO_POOL) {
      const int count = window();
      const bool highest = layer.pool == MAX_POOL;
      auto value = [&](int k) { return activate(uhat(source(k)), layer.before, Real(layer.before_negative_slope)); };
      base = value(0);
      PCFAST_NO_UNROLL
      for (int k = 1; k < count; ++k) {
        const Real other = value(k);
        if (!highest)
          base += other;
        else if (other > base || other != other)
          base = other;
      }
      // max_k((v_k - v_highest) + moved_k): the first wins a tie, NaN wins always, as in PyTorch
      difference = 0;
      PCFAST_NO_UNROLL
      for (int k = 0; k < count; ++k) {
        const Real moved = before(source(k)).bracket;
        const Real relative = (value(k) - base) + moved;
        if (!highest) {
          difference += moved;
        } else if (k == 0 || relative > difference || (relative != relative && difference == difference)) {
          difference = relative;
          winner = k;
        }
      }
      if (!highest) base /= count, difference /= count;
    }
    return after(base, difference);
  }

  // What of an error behind the pool's activation reaches element k of the window.
  __device__ Real share(int k, Real error, int winner) const {
    if (layer.pool == NO_POOL) return error;
    if (layer.pool == MAX_POOL && k != winner) return Real(0);
    return (layer.pool == MAX_POOL ? error : error / window()) * before(source(k)).slope;
  }
};

// Of a dense tensor in device memory whose rows are samples.
template <class Real>
__device__ Real* row_of(void* tensor, int64_t row, int64_t size) {
  return static_cast<Real*>(tensor) + row * size;
}
template <class Real>
__device__ const Real* row_of(const void* tensor, int64_t row, int64_t size) {
  return static_cast<const Real*>(tensor) + row * size;
}

// An error that has reached the product of layer l: delta, or in Gram form S <- S + eta (delta - S).
template <class Real>
__device__ void pull_back(const Moment<Real>& now, int l, const Element<Real>& where, int source, Real value) {
  const Layer& layer = now.program.layers[l - 1];
  Real& stored = now.memory[at(layer.delta, where.sample, where.channel, source / layer.width % layer.height,
                               source % layer.width)];
  if (!layer.gram) {
    stored = value;
    return;
  }
  if (now.last) {
    const int64_t sample = now.first_sample + where.sample;
    const int inner = layer.channels * layer.height * layer.width;
    static_cast<Real*>(now.tensors.gram_sum_before)[sample * inner + source] = stored;
  }
  stored += now.eta * (value - stored);
  note_bad(now, 1, stored);
}

// Predict stage of a hidden layer: eps = bracket - d, delta = eps pulled back to the product, d += eta eps.
//
// `finish`: after the last iteration, of any layer: its last errors, pulled back at the last beliefs, into device memory
// for the weight gradients.
template <class Real>
__device__ void pull_errors(const Moment<Real>& now, int l, bool moved, bool finish, int thread, int threads) {
  const Layer& layer = now.program.layers[l - 1];
  const int size = layer.channels * layer.pooled_height * layer.pooled_width;
  const int inner = layer.channels * layer.height * layer.width;
  Real* errors = row_of<Real>(now.tensors.error[l - 1], now.first_sample, size);
  Real* out = row_of<Real>(now.tensors.local_error[l - 1], now.first_sample, inner);
  for (int e = thread; e < now.samples * size; e += threads) {
    const Element<Real> where = element<Real>(layer, e);
    const Tail<Real> tail{layer, now.memory, moved, where};
    int winner;
    const Moved<Real> found = tail.evaluate(winner);
    Real error;
    if (finish) {
      error = errors[e];
    } else {
      Real& d = now.memory[at(layer.d, where.sample, where.channel, where.y, where.x)];
      error = found.bracket - d;
      if (now.moves) d += now.eta * error;
      if (now.last) errors[e] = error;
    }
    PCFAST_NO_UNROLL
    for (int k = 0; k < tail.window(); ++k) {
      const int source = tail.source(k);
      const Real value = tail.share(k, error * found.slope, winner);
      if (finish)
        out[where.sample * inner + source] = value;
      else
        pull_back(now, l, where, source, value);
    }
  }
}

// The loss's gradient at mu = vhat + bracket, one warp a sample; eps and delta of the output layer.
template <class Real>
__device__ void output_error(const Moment<Real>& now, bool moved, const Warp& warp) {
  enum Pass : int { HIGHEST, SUM, ERROR };
  const Program& program = now.program;
  const Layer& layer = program.layers[program.depth - 1];
  const int classes = program.classes;
  Real* errors = row_of<Real>(now.tensors.error[program.depth - 1], now.first_sample, classes);
  // from the last warp on, since the first ones have the hidden layers
  for (int n = warp.count - 1 - warp.index; n < now.samples; n += warp.count) {
    const Real* vhat = now.memory + program.vhat + n * program.classes_stride;
    const Real* dense = now.memory + program.dense + n * program.classes_stride;
    Real highest = Real(-3.0e38), sum = 0;
    PCFAST_NO_UNROLL
    for (int pass = program.loss == CROSS_ENTROPY ? HIGHEST : ERROR; pass <= ERROR; ++pass) {
      for (int c = warp.lane; c < classes; c += kWarpSize) {
        const Element<Real> where{n, c, 0, 0, c};
        int winner;
        const Moved<Real> found = Tail<Real>{layer, now.memory, moved, where}.evaluate(winner);
        const Real output = vhat[c] + found.bracket;
        if (pass == HIGHEST) {
          highest = fmax(highest, output);
        } else if (pass == SUM) {
          sum += exp(output - highest);  // NaN was lost in the maximum and comes back here
        } else {
          const Real error = program.loss == CROSS_ENTROPY
                                 ? exp(output - highest) / sum * now.memory[program.mass + n] - dense[c]
                                 : (output - dense[c]) * now.loss_scale;
          if (now.last) errors[n * classes + c] = error;
          pull_back(now, program.depth, where, c, error * found.slope);
        }
      }
      if (pass == HIGHEST) highest = tile::warp_max(highest);
      if (pass == SUM) sum = tile::warp_sum(sum);
    }
  }
}

// Feedback stage: d -= eta r; layer 1, whose prediction is constant, has eps = -d besides.
template <class Real>
__device__ void update(const Moment<Real>& now, int l, int thread, int threads) {
  const Layer& layer = now.program.layers[l - 1];
  const Product& feedback = now.program.layers[l].feedback;
  const int size = layer.channels * layer.pooled_height * layer.pooled_width;
  for (int e = thread; e < now.samples * size; e += threads) {
    const Element<Real> where = element<Real>(layer, e);
    Real& d = now.memory[at(layer.d, where.sample, where.channel, where.y, where.x)];
    Real pulled = summed(feedback, now.memory, where.sample, where.index);
    if (l == 1) {
      if (now.last) {
        const int64_t sample = now.first_sample + where.sample;
        static_cast<Real*>(now.tensors.error[0])[sample * size + where.index] = -d;
      }
      pulled += d;
    }
    d -= now.eta * pulled;
    note_bad(now, l, d);
  }
}

}  // namespace pcfast::resident
