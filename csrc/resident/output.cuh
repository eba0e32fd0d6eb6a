// The output layer: its targets, its loss at the forward pass and the loss's gradient at moving predictions.
#pragma once

#include "../tile/warp_reduce.cuh"
#include "pointwise.cuh"

namespace pcfast::resident {

// The weight of a row of the batch in a mean of cross-entropy, and whether its label is valid.
template <class Real>
struct Row {
  int label;
  Real weight;  // its class's weight; 0 where the row is ignored
  bool ignored, invalid;
};

template <class Real>
__device__ Row<Real> row_at(const KernelContext<Real>& ctx, int64_t row) {
  const int64_t label = ctx.tensors.labels[row];
  const bool ignored = label == ctx.run.ignored_label;
  const bool invalid = ignored ? ctx.run.every_row != 0 : label < 0 || label >= ctx.program.classes;
  const int inside = static_cast<int>(min(max(label, int64_t(0)), int64_t(ctx.program.classes - 1)));
  const Real* weights = static_cast<const Real*>(ctx.tensors.class_weight);
  return {inside, ignored ? Real(0) : weights ? weights[inside] : Real(1), ignored, invalid};
}

// Returns the sum of the weights of all rows of the batch. Every block computes the same sum in the same order, so that
// none waits for another. `partials`, one per warp, may be written again after the next barrier.
template <class Real>
__device__ Real batch_weight(const KernelContext<Real>& ctx, Real* partials, int thread, int threads, const Warp& warp) {
  Real sum = 0;
  bool invalid = false;
  for (int n = thread; n < ctx.run.batch; n += threads) {
    const Row<Real> row = row_at(ctx, n);
    sum += row.weight;
    invalid = invalid || row.invalid;
  }
  if (invalid && ctx.first_sample == 0) atomicMin(ctx.tensors.first_bad + ctx.program.depth - 1, 0);
  sum = tile::warp_sum(sum);
  if (warp.lane == 0) partials[warp.index] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < warp.count; ++i) sum += partials[i];
  return sum;
}

// Computes the block's targets and their sums. The whole block sees what was written before the call and the targets; the
// sums only after one more barrier.
//
// Cross-entropy is -sum_c target[c] log_softmax(mu)[c] (pcfast/losses.py) and target_sum is the sum of target; mse compares
// with target.
template <class Real>
__device__ void load_targets(const KernelContext<Real>& ctx, int thread, int threads, const Warp& warp) {
  const Program& program = ctx.program;
  const RunParams& run = ctx.run;
  const int classes = program.classes;
  const Real* given = static_cast<const Real*>(ctx.tensors.target);
  const Real* weights = static_cast<const Real*>(ctx.tensors.class_weight);
  const bool labels = ctx.tensors.labels != nullptr;
  Real scale = 1;
  if (labels) {
    Real* scratch = ctx.memory + program.layers[1].predict.scratch;  // its beginning
    const Real weight = batch_weight(ctx, scratch, thread, threads, warp);
    // where all labels are ignored the weights sum to zero, and the gradient is zero
    if (run.mean) scale = weight > 0 ? Real(run.share) / weight : Real(0);
  } else if (run.mean) {
    scale = Real(run.share) / Real(run.batch);
  }
  const Real own = Real(1 - run.smoothing), spread = Real(run.smoothing / classes);
  for (int i = thread; i < ctx.samples * classes; i += threads) {
    const int n = i / classes, c = i % classes;
    const int64_t sample = ctx.first_sample + n;
    Real target;
    if (program.loss == kMse) {
      target = given[sample * classes + c];
    } else if (labels) {
      const Row<Real> row = row_at(ctx, sample);
      target = row.label == c ? row.weight * own : Real(0);
      if (!row.ignored) target += (weights ? weights[c] : Real(1)) * spread;
      target *= scale;
    } else {
      target = (given[sample * classes + c] * own + spread) * (weights ? weights[c] : Real(1)) * scale;
    }
    ctx.memory[program.target + n * program.classes_stride + c] = target;
  }
  __syncthreads();
  for (int n = warp.index; n < ctx.samples; n += warp.count) {
    Real target_sum = 0;
    for (int c = warp.lane; c < classes; c += kWarpSize)
      target_sum += ctx.memory[program.target + n * program.classes_stride + c];
    target_sum = tile::warp_sum(target_sum);
    if (warp.lane == 0) ctx.memory[program.target_sum + n] = target_sum;
  }
}

// Returns how many warps, the block's last ones, compute the output layer in a predict stage; the others compute the hidden
// layers.
__device__ inline int output_warps(const Program& program) {
  return max(min(program.samples, static_cast<int>(blockDim.x) / kWarpSize / 2), 1);
}

// Computes the loss's gradient at mu = vhat + act_diff, which is eps and delta of the output layer; before the iterations
// (`forward`) at vhat, with the sample's share of the loss there. One warp works on one sample.
//
// Cross-entropy takes three passes over the classes (maximum, sum of exponentials, error), mse one.
template <class Real>
__device__ void output_error(const KernelContext<Real>& ctx, bool forward, bool moved, const Warp& warp) {
  enum Pass : int { kMaximum, kSum, kError };
  const Program& program = ctx.program;
  const Layer& layer = program.layers[program.depth - 1];
  const int classes = program.classes;
  const Real loss_scale = Real(ctx.run.loss_scale);
  void* saved = forward ? ctx.tensors.output_gradient : ctx.last ? ctx.tensors.error[program.depth - 1] : nullptr;
  const int warps = output_warps(program);
  if (warp.count - 1 - warp.index >= warps) return;
  for (int n = warp.count - 1 - warp.index; n < ctx.samples; n += warps) {
    const Real* vhat = ctx.memory + program.vhat + n * program.classes_stride;
    const Real* target = ctx.memory + program.target + n * program.classes_stride;
    Real highest = Real(-3.0e38), sum = 0, loss = 0;
    const int first_pass = program.loss == kCrossEntropy ? kMaximum : kError;
    ActDiff<Real> own{};  // the lane's first class, often its only one: computed in the first pass and reused
    PCFAST_NO_UNROLL
    for (int pass = first_pass; pass <= kError; ++pass) {
      for (int c = warp.lane; c < classes; c += kWarpSize) {
        ActDiff<Real> diff = own;
        if (pass == first_pass || c != warp.lane) {
          const Product& product = layer.predict;
          const Real s =
              moved ? reduce_partials(Partials(product), first_partial(product, ctx.memory, n, c)) : Real(0);
          diff = activate_after_pool(layer, ctx.memory[layer.uhat + n * layer.uhat_sample + c], s);
          if (c == warp.lane) own = diff;
        }
        const Real output = vhat[c] + diff.act_diff;
        if (pass == kMaximum) {
          highest = fmax(highest, output);
        } else if (pass == kSum) {
          sum += exp(output - highest);  // the maximum loses a NaN, the sum brings it back
        } else {
          Real error;
          if (program.loss == kCrossEntropy) {
            error = exp(output - highest) / sum * ctx.memory[program.target_sum + n] - target[c];
            // 0 log 0 = 0: a class of probability 0 outside the target costs nothing
            if (target[c] != 0) loss -= target[c] * ((output - highest) - log(sum));
          } else {
            const Real difference = output - target[c];
            error = difference * loss_scale;
            loss += difference * difference * (loss_scale / 2);
          }
          if (saved) global_element(ctx, saved, n, classes, c) = error;
          if (!forward) pull_back(ctx, layer, ctx.memory[offset(layer.delta, n, c, 0, 0)], n, c, error * diff.derivative);
        }
      }
      if (pass == kMaximum) highest = tile::warp_max(highest);
      if (pass == kSum) sum = tile::warp_sum(sum);
    }
    if (!forward) continue;
    loss = tile::warp_sum(loss);
    if (warp.lane == 0) global_element(ctx, ctx.tensors.loss_rows, n, 1, 0) = loss;
  }
}

}  // namespace pcfast::resident
