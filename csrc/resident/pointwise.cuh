// Pointwise work of the forward pass and of the two stages: threads run over the numbers that a layer gives.
#pragma once

#include "tail.cuh"

namespace pcfast::resident {

// Forward pass of layer l, from its product: uhat, and vhat where the layer above reads d.
template <class Real>
__device__ void forward_values(const Moment<Real>& now, int l, int thread, int threads) {
  const Program& program = now.program;
  const Layer& layer = program.layers[l - 1];
  const Real* bias = static_cast<const Real*>(now.tensors.bias[l - 1]);
  int item = thread;
  each_number(now, layer, item, threads, [&](const Element& where, int first, int end) {
    for (int sample = first; sample < end; ++sample) {
      const Tail<Real> tail{layer, now.memory, false, where, sample};
      if (!layer.gram) {
        for (int k = 0; k < tail.window(); ++k) {
          const int source = tail.source(k).index;
          Real u = summed(Parts(layer.predict), first_part(layer.predict, now.memory, sample, source));
          if (bias) u += bias[where.channel];
          now.memory[layer.uhat + sample * layer.uhat_sample + source] = u;
        }
      }
      const Real value = tail.value();
      number_of(now, now.tensors.vhat[l - 1], sample, layer.size, where.index) = value;
      if (l < program.depth)
        now.memory[at(layer.d, sample, where)] = value;
      else
        now.memory[program.vhat + sample * program.classes_stride + where.index] = value;
    }
  });
}

// Beliefs move along g = eps - r: d += eta g. With momentum m <- momentum m + g, d += eta m; eps comes in the predict stage,
// r in the feedback stage, which moves d. A layer that nothing has reached has no velocity.

// An error that has reached number `index` of the product: delta, or in Gram form S, which moves along delta - S.
template <class Real>
__device__ void pull_back(const Moment<Real>& now, const Layer& layer, Real& stored, int sample, int index, Real value) {
  if (!layer.gram) {
    stored = value;
    return;
  }
  if (now.last) {
    const int inner = layer.channels * layer.height * layer.width;
    number_of(now, now.tensors.gram_sum_before, sample, inner, index) = stored;
  }
  Real step = value - stored;
  if (now.momentum != 0) {
    Real& m = velocity(now, 1, sample, index);
    step = m = now.momentum * m + step;
  }
  stored += now.eta * step;
  note_bad(now, 1, stored);
}

// Predict stage of a hidden layer: eps = bracket - d, and its part of the move of d.
template <class Real>
__device__ Real error_of(const Moment<Real>& now, int l, Real& d, int sample, int index, Real bracket) {
  const Real error = bracket - d;
  if (now.momentum != 0) {
    Real& m = velocity(now, l, sample, index);
    m = now.momentum * m + error;
  } else if (now.moves) {
    d += now.eta * error;
  }
  if (now.last) number_of(now, now.tensors.error[l - 1], sample, now.program.layers[l - 1].size, index) = error;
  return error;
}

// Predict stage of a hidden layer, from s: eps, and delta, which is eps pulled back to the product.
//
// `finish`: after the last iteration, of any layer: its last errors, pulled back at the last beliefs, into device memory
// for the weight gradients.
template <class Real>
__device__ void pull_errors(const Moment<Real>& now, int l, bool moved, bool finish, int& item, int threads) {
  const Layer& layer = now.program.layers[l - 1];
  const auto known_error = [&](int sample, int index) {
    return number_of(now, now.tensors.error[l - 1], sample, layer.size, index);
  };
  const auto finished = [&](int sample, int index, Real value) {
    const int inner = layer.channels * layer.height * layer.width;
    number_of(now, now.tensors.local_error[l - 1], sample, inner, index) = value;
  };
  each_number(now, layer, item, threads, [&](const Element& where, int first, int end) {
    tile::SharedPointer<Real> d = now.memory + at(layer.d, first, where);
    if (layer.pool == NO_POOL) {
      const int index = where.index;
      tile::SharedPointer<Real> uhat = now.memory + layer.uhat + first * layer.uhat_sample + index;
      tile::SharedPointer<Real> stored = now.memory + at(layer.delta, first, where);
      tile::SharedPointer<const Real> part = first_part(layer.predict, now.memory, first, index);
      const Parts parts(layer.predict);
      const int d_step = tile::in_register(layer.d.samples), uhat_step = tile::in_register(layer.uhat_sample);
      const int stored_step = tile::in_register(layer.delta.samples);
      const int part_step = tile::in_register(layer.predict.scratch_sample);
      PCFAST_NO_UNROLL
      for (int sample = first; sample < end; ++sample) {
        const Moved<Real> found = after(layer, *uhat, moved ? summed(parts, part) : Real(0));
        if (finish)
          finished(sample, index, known_error(sample, index) * found.slope);
        else
          pull_back(now, layer, *stored, sample, index,
                    error_of(now, l, *d, sample, index, found.bracket) * found.slope);
        d += d_step;
        uhat += uhat_step;
        stored += stored_step;
        part += part_step;
      }
      return;
    }
    PCFAST_NO_UNROLL
    for (int sample = first; sample < end; ++sample) {
      const Tail<Real> tail{layer, now.memory, moved, where, sample};
      int winner;
      const Moved<Real> found = tail.evaluate(winner);
      const Real error = finish ? known_error(sample, where.index)
                                : error_of(now, l, *d, sample, where.index, found.bracket);
      d += layer.d.samples;
      PCFAST_NO_UNROLL
      for (int k = 0; k < tail.window(); ++k) {
        const Source source = tail.source(k);
        const Real value = tail.share(k, error * found.slope, winner);
        if (finish) {
          finished(sample, source.index, value);
        } else {
          Real& stored = now.memory[at(layer.delta, sample, where.channel, source.y, source.x)];
          pull_back(now, layer, stored, sample, source.index, value);
        }
      }
    }
  });
}

// Feedback stage: r's part of the move; layer 1, whose prediction is constant, has eps = -d besides.
template <class Real>
__device__ void update(const Moment<Real>& now, int l, int& item, int threads) {
  const Layer& layer = now.program.layers[l - 1];
  const Product& feedback = now.program.layers[l].feedback;
  each_number(now, layer, item, threads, [&](const Element& where, int first, int end) {
    tile::SharedPointer<Real> d = now.memory + at(layer.d, first, where);
    tile::SharedPointer<const Real> part = first_part(feedback, now.memory, first, where.index);
    const Parts parts(feedback);
    const int d_step = tile::in_register(layer.d.samples), part_step = tile::in_register(feedback.scratch_sample);
    PCFAST_NO_UNROLL
    for (int sample = first; sample < end; ++sample) {
      Real pulled = summed(parts, part);
      if (l == 1) {
        if (now.last) number_of(now, now.tensors.error[0], sample, layer.size, where.index) = -*d;
        pulled += *d;
      }
      if (now.momentum != 0) {
        Real& m = velocity(now, l, sample, where.index);
        m = (l == 1 ? now.momentum * m : m) - pulled;
        pulled = -m;
      }
      *d -= now.eta * pulled;
      note_bad(now, l, static_cast<Real>(*d));
      d += d_step;
      part += part_step;
    }
  });
}

}  // namespace pcfast::resident
