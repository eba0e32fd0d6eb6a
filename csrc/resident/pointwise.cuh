// Pointwise work of the forward pass and of the two stages: threads run over the numbers that a layer gives.
#pragma once

#include "tail.cuh"

namespace pcfast::resident {

// Forward pass of layer l, from its product: uhat, and vhat where the layer above reads d.
template <class Real>
__device__ void forward_values(const Moment<Real>& now, int l, int thread, int threads) {
  const Program& program = now.program;
  const Layer& layer = program.layers[l - 1];
  const int size = layer.by_size.value;
  const Real* bias = static_cast<const Real*>(now.tensors.bias[l - 1]);
  Real* vhat = row_of<Real>(now.tensors.vhat[l - 1], now.first_sample, size);
  for (int e = thread; e < now.samples * size; e += threads) {
    const Element<Real> where = element<Real>(layer, e);
    const Tail<Real> tail{layer, now.memory, false, where};
    if (!layer.gram) {
      for (int k = 0; k < tail.window(); ++k) {
        const int source = tail.source(k).index;
        Real u = summed(layer.predict, now.memory, where.sample, source);
        if (bias) u += bias[where.channel];
        now.memory[layer.uhat + where.sample * layer.uhat_sample + source] = u;
      }
    }
    const Real value = tail.value();
    vhat[e] = value;
    if (l < program.depth)
      now.memory[at(layer.d, where.sample, where.channel, where.y, where.x)] = value;
    else
      now.memory[program.vhat + where.sample * program.classes_stride + where.index] = value;
  }
}

// Beliefs move along g = eps - r: d += eta g. With momentum m <- momentum m + g, d += eta m; eps comes in the predict stage,
// r in the feedback stage, which moves d. A layer that nothing has reached has no velocity.

// An error that has reached the product of layer l: delta, or in Gram form S, which moves along delta - S.
template <class Real>
__device__ void pull_back(const Moment<Real>& now, int l, const Element<Real>& where, const Source& source,
                          Real value) {
  const Layer& layer = now.program.layers[l - 1];
  Real& stored = now.memory[at(layer.delta, where.sample, where.channel, source.y, source.x)];
  if (!layer.gram) {
    stored = value;
    return;
  }
  if (now.last) {
    const int64_t sample = now.first_sample + where.sample;
    const int inner = layer.channels * layer.height * layer.width;
    static_cast<Real*>(now.tensors.gram_sum_before)[sample * inner + source.index] = stored;
  }
  Real step = value - stored;
  if (now.momentum != 0) {
    Real& m = velocity(now, 1, where.sample, source.index);
    step = m = now.momentum * m + step;
  }
  stored += now.eta * step;
  note_bad(now, 1, stored);
}

// Predict stage of a hidden layer: eps = bracket - d, delta = eps pulled back to the product; eps's part of the move.
//
// `finish`: after the last iteration, of any layer: its last errors, pulled back at the last beliefs, into device memory
// for the weight gradients.
template <class Real>
__device__ void pull_errors(const Moment<Real>& now, int l, bool moved, bool finish, int thread, int threads) {
  const Layer& layer = now.program.layers[l - 1];
  const int size = layer.by_size.value;
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
      if (now.momentum != 0) {
        Real& m = velocity(now, l, where.sample, where.index);
        m = now.momentum * m + error;
      } else if (now.moves) {
        d += now.eta * error;
      }
      if (now.last) errors[e] = error;
    }
    PCFAST_NO_UNROLL
    for (int k = 0; k < tail.window(); ++k) {
      const Source source = tail.source(k);
      const Real value = tail.share(k, error * found.slope, winner);
      if (finish)
        out[where.sample * inner + source.index] = value;
      else
        pull_back(now, l, where, source, value);
    }
  }
}

// Feedback stage: r's part of the move; layer 1, whose prediction is constant, has eps = -d besides.
template <class Real>
__device__ void update(const Moment<Real>& now, int l, int thread, int threads) {
  const Layer& layer = now.program.layers[l - 1];
  const Product& feedback = now.program.layers[l].feedback;
  const int size = layer.by_size.value;
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
    if (now.momentum != 0) {
      Real& m = velocity(now, l, where.sample, where.index);
      m = (l == 1 ? now.momentum * m : m) - pulled;
      pulled = -m;
    }
    d -= now.eta * pulled;
    note_bad(now, l, d);
  }
}

}  // namespace pcfast::resident
