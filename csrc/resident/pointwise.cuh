// Pointwise work of the forward pass and of the two stages: threads run over the elements of a layer's output.
#pragma once

#include "tail.cuh"

namespace pcfast::resident {

// Computes the forward pass of layer l from its product: uhat, and vhat, which goes where the layer above reads d.
template <class Real>
__device__ void forward_values(const KernelContext<Real>& ctx, int l, int thread, int threads) {
  const Program& program = ctx.program;
  const Layer& layer = program.layers[l - 1];
  const Real* bias = static_cast<const Real*>(ctx.tensors.bias[l - 1]);
  int item = thread;
  for_each_element(ctx, layer, item, threads, [&](const Element& element, int first, int end) {
    for (int sample = first; sample < end; ++sample) {
      const Tail<Real> tail{layer, ctx.memory, false, element, sample};
      if (!layer.gram) {
        for (int k = 0; k < tail.window(); ++k) {
          const int source = tail.source(k).index;
          Real u = reduce_partials(Partials(layer.predict), first_partial(layer.predict, ctx.memory, sample, source));
          if (bias) u += bias[element.channel];
          ctx.memory[layer.uhat + sample * layer.uhat_sample + source] = u;
        }
      }
      const Real value = tail.value();
      global_element(ctx, ctx.tensors.vhat[l - 1], sample, layer.size, element.index) = value;
      if (l < program.depth)
        ctx.memory[offset(layer.d, sample, element)] = value;
      else
        ctx.memory[program.vhat + sample * program.classes_stride + element.index] = value;
    }
  });
}

// Beliefs move along g = eps - r: d += eta g. With momentum m <- momentum m + g, d += eta m: the predict stage adds eps,
// the feedback stage subtracts r and moves d. A layer that the active front (fact 3) has not reached has velocity zero.

// Stores an error that was pulled back to element `index` of the product as delta. In Gram form (fact 7) S, which `stored`
// is then, moves along delta - S instead.
template <class Real>
__device__ void pull_back(const KernelContext<Real>& ctx, const Layer& layer, Real& stored, int sample, int index,
                          Real value) {
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

// Returns a hidden layer's error eps = act_diff - d, and moves d by eps's part of its step.
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

// Predict stage of a hidden layer: computes eps from s, and delta, which is eps pulled back to the product.
//
// With `finish`, after the last iteration and for any layer: pulls the last errors back at the last beliefs and stores them
// in device memory for the weight gradients.
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
  for_each_element(ctx, layer, item, threads, [&](const Element& element, int first, int end) {
    tile::SharedPointer<Real> d = ctx.memory + offset(layer.d, first, element);
    if (layer.pool == kNoPool) {
      const int index = element.index;
      tile::SharedPointer<Real> uhat = ctx.memory + layer.uhat + first * layer.uhat_sample + index;
      tile::SharedPointer<Real> stored = ctx.memory + offset(layer.delta, first, element);
      tile::SharedPointer<const Real> partial = first_partial(layer.predict, ctx.memory, first, index);
      const Partials partials(layer.predict);
      const int d_step = tile::in_register(layer.d.samples), uhat_step = tile::in_register(layer.uhat_sample);
      const int stored_step = tile::in_register(layer.delta.samples);
      const int partial_step = tile::in_register(layer.predict.scratch_sample);
      PCFAST_NO_UNROLL
      for (int sample = first; sample < end; ++sample) {
        const ActDiff<Real> diff = activate_after_pool(layer, *uhat, moved ? reduce_partials(partials, partial) : Real(0));
        if (finish)
          finished(sample, index, known_error(sample, index) * diff.derivative);
        else
          pull_back(ctx, layer, *stored, sample, index,
                    error_of(ctx, l, *d, sample, index, diff.act_diff) * diff.derivative);
        d += d_step;
        uhat += uhat_step;
        stored += stored_step;
        partial += partial_step;
      }
      return;
    }
    PCFAST_NO_UNROLL
    for (int sample = first; sample < end; ++sample) {
      const Tail<Real> tail{layer, ctx.memory, moved, element, sample};
      int winner;
      const ActDiff<Real> diff = tail.evaluate(winner);
      const Real error = finish ? known_error(sample, element.index)
                                : error_of(ctx, l, *d, sample, element.index, diff.act_diff);
      d += layer.d.samples;
      PCFAST_NO_UNROLL
      for (int k = 0; k < tail.window(); ++k) {
        const Source source = tail.source(k);
        const Real value = tail.share(k, error * diff.derivative, winner);
        if (finish) {
          finished(sample, source.index, value);
        } else {
          Real& stored = ctx.memory[offset(layer.delta, sample, element.channel, source.y, source.x)];
          pull_back(ctx, layer, stored, sample, source.index, value);
        }
      }
    }
  });
}

// Feedback stage: moves d by r's part of its step, and layer 1 by eps too: its input is clamped (fact 2), so that its
// prediction is constant and eps = -d.
template <class Real>
__device__ void update_beliefs(const KernelContext<Real>& ctx, int l, int& item, int threads) {
  const Layer& layer = ctx.program.layers[l - 1];
  const Product& feedback = ctx.program.layers[l].feedback;
  for_each_element(ctx, layer, item, threads, [&](const Element& element, int first, int end) {
    tile::SharedPointer<Real> d = ctx.memory + offset(layer.d, first, element);
    tile::SharedPointer<const Real> partial = first_partial(feedback, ctx.memory, first, element.index);
    const Partials partials(feedback);
    const int d_step = tile::in_register(layer.d.samples), partial_step = tile::in_register(feedback.scratch_sample);
    PCFAST_NO_UNROLL
    for (int sample = first; sample < end; ++sample) {
      Real pulled = reduce_partials(partials, partial);
      if (l == 1) {
        if (ctx.last) global_element(ctx, ctx.tensors.error[0], sample, layer.size, element.index) = -*d;
        pulled += *d;
      }
      if (ctx.momentum != 0) {
        Real& m = velocity(ctx, l, sample, element.index);
        m = (l == 1 ? ctx.momentum * m : m) - pulled;
        pulled = -m;
      }
      *d -= ctx.eta * pulled;
      record_nonfinite(ctx, l, static_cast<Real>(*d));
      d += d_step;
      partial += partial_step;
    }
  });
}

}  // namespace pcfast::resident
