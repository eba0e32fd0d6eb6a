// Pointwise work of the forward pass and of the two stages: threads run over the numbers that a layer gives.
#pragma once

#include "tail.cuh"

namespace pcfast::resident {

// Forward pass of layer l, from its product: uhat, and vhat where the layer above reads d.
template <class Real>
__device__ void forward_values(const KernelContext<Real>& ctx, int l, int thread, int threads) {
  const Program& program = ctx.program;
  const Layer& layer = program.layers[l - 1];
  const Real* bias = static_cast<const Real*>(ctx.tensors.bias[l - 1]);
  int item = thread;
  for_each_element(ctx, layer, item, threads, [&](const Element& where, int first, int end) {
    for (int sample = first; sample < end; ++sample) {
      const Tail<Real> tail{layer, ctx.memory, false, where, sample};
      if (!layer.gram) {
        for (int k = 0; k < tail.window(); ++k) {
          const int source = tail.source(k).index;
          Real u = reduce_partials(Partials(layer.predict), first_partial(layer.predict, ctx.memory, sample, source));
          if (bias) u += bias[where.channel];
          ctx.memory[layer.uhat + sample * layer.uhat_sample + source] = u;
        }
      }
      const Real value = tail.value();
      global_element(ctx, ctx.tensors.vhat[l - 1], sample, layer.size, where.index) = value;
      if (l < program.depth)
        ctx.memory[at(layer.d, sample, where)] = value;
      else
        ctx.memory[program.vhat + sample * program.classes_stride + where.index] = value;
    }
  });
}

// Beliefs move along g = eps - r: d += eta g. With momentum m <- momentum m + g, d += eta m; eps comes in the predict stage,
// r in the feedback stage, which moves d. A layer that nothing has reached has no velocity.

// An error that has reached number `index` of the product: delta, or in Gram form S, which moves along delta - S.
template <class Real>
__device__ void pull_back(const KernelContext<Real>& ctx, const Layer& layer, Real& stored, int sample, int index, Real value) {
  if (!layer.gram) {
    stored = value;
    return;
  }
  if (ctx.last) {
    const int inner = layer.channels * layer.height * layer.width;
    global_element(ctx, ctx.tensors.gram_sum_before, sample, inner, index) = stored;
  }
  Real step = value - stored;
  if (ctx.momentum != 0) {
    Real& m = velocity(ctx, 1, sample, index);
    step = m = ctx.momentum * m + step;
  }
  stored += ctx.eta * step;
  record_nonfinite(ctx, 1, stored);
}

// Predict stage of a hidden layer: eps = act_diff - d, and its part of the move of d.
template <class Real>
__device__ Real error_of(const KernelContext<Real>& ctx, int l, Real& d, int sample, int index, Real act_diff) {
  const Real error = act_diff - d;
  if (ctx.momentum != 0) {
    Real& m = velocity(ctx, l, sample, index);
    m = ctx.momentum * m + error;
  } else if (ctx.moves) {
    d += ctx.eta * error;
  }
  if (ctx.last) global_element(ctx, ctx.tensors.error[l - 1], sample, ctx.program.layers[l - 1].size, index) = error;
  return error;
}

// Predict stage of a hidden layer, from s: eps, and delta, which is eps pulled back to the product.
//
// `finish`: after the last iteration, of any layer: its last errors, pulled back at the last beliefs, into device memory
// for the weight gradients.
template <class Real>
__device__ void hidden_errors(const KernelContext<Real>& ctx, int l, bool moved, bool finish, int& item, int threads) {
  const Layer& layer = ctx.program.layers[l - 1];
  const auto known_error = [&](int sample, int index) {
    return global_element(ctx, ctx.tensors.error[l - 1], sample, layer.size, index);
  };
  const auto finished = [&](int sample, int index, Real value) {
    const int inner = layer.channels * layer.height * layer.width;
    global_element(ctx, ctx.tensors.local_error[l - 1], sample, inner, index) = value;
  };
  for_each_element(ctx, layer, item, threads, [&](const Element& where, int first, int end) {
    tile::SharedPointer<Real> d = ctx.memory + at(layer.d, first, where);
    if (layer.pool == kNoPool) {
      const int index = where.index;
      tile::SharedPointer<Real> uhat = ctx.memory + layer.uhat + first * layer.uhat_sample + index;
      tile::SharedPointer<Real> stored = ctx.memory + at(layer.delta, first, where);
      tile::SharedPointer<const Real> part = first_partial(layer.predict, ctx.memory, first, index);
      const Partials parts(layer.predict);
      const int d_step = tile::in_register(layer.d.samples), uhat_step = tile::in_register(layer.uhat_sample);
      const int stored_step = tile::in_register(layer.delta.samples);
      const int partial_step = tile::in_register(layer.predict.scratch_sample);
      PCFAST_NO_UNROLL
      for (int sample = first; sample < end; ++sample) {
        const ActDiff<Real> found = after(layer, *uhat, moved ? reduce_partials(parts, part) : Real(0));
        if (finish)
          finished(sample, index, known_error(sample, index) * found.derivative);
        else
          pull_back(ctx, layer, *stored, sample, index,
                    error_of(ctx, l, *d, sample, index, found.act_diff) * found.derivative);
        d += d_step;
        uhat += uhat_step;
        stored += stored_step;
        part += partial_step;
      }
      return;
    }
    PCFAST_NO_UNROLL
    for (int sample = first; sample < end; ++sample) {
      const Tail<Real> tail{layer, ctx.memory, moved, where, sample};
      int winner;
      const ActDiff<Real> found = tail.evaluate(winner);
      const Real error = finish ? known_error(sample, where.index)
                                : error_of(ctx, l, *d, sample, where.index, found.act_diff);
      d += layer.d.samples;
      PCFAST_NO_UNROLL
      for (int k = 0; k < tail.window(); ++k) {
        const Source source = tail.source(k);
        const Real value = tail.share(k, error * found.derivative, winner);
        if (finish) {
          finished(sample, source.index, value);
        } else {
          Real& stored = ctx.memory[at(layer.delta, sample, where.channel, source.y, source.x)];
          pull_back(ctx, layer, stored, sample, source.index, value);
        }
      }
    }
  });
}

// Feedback stage: r's part of the move; layer 1, whose prediction is constant, has eps = -d besides.
template <class Real>
__device__ void update_beliefs(const KernelContext<Real>& ctx, int l, int& item, int threads) {
  const Layer& layer = ctx.program.layers[l - 1];
  const Product& feedback = ctx.program.layers[l].feedback;
  for_each_element(ctx, layer, item, threads, [&](const Element& where, int first, int end) {
    tile::SharedPointer<Real> d = ctx.memory + at(layer.d, first, where);
    tile::SharedPointer<const Real> part = first_partial(feedback, ctx.memory, first, where.index);
    const Partials parts(feedback);
    const int d_step = tile::in_register(layer.d.samples), partial_step = tile::in_register(feedback.scratch_sample);
    PCFAST_NO_UNROLL
    for (int sample = first; sample < end; ++sample) {
      Real pulled = reduce_partials(parts, part);
      if (l == 1) {
        if (ctx.last) global_element(ctx, ctx.tensors.error[0], sample, layer.size, where.index) = -*d;
        pulled += *d;
      }
      if (ctx.momentum != 0) {
        Real& m = velocity(ctx, l, sample, where.index);
        m = (l == 1 ? ctx.momentum * m : m) - pulled;
        pulled = -m;
      }
      *d -= ctx.eta * pulled;
      record_nonfinite(ctx, l, static_cast<Real>(*d));
      d += d_step;
      part += partial_step;
    }
  });
}

}  // namespace pcfast::resident
