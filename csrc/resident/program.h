// The resident kernel's arguments: a network's loop as plain numbers, filled in by pcfast/backends/cuda/shared_memory.py
// through the mirror of these structs, kernel_params.py.
//
// A thread block keeps all of this in its shared memory, in elements of the state's scalar type, from offset 0 on:
//
//     weights   per layer  [input channel][tap y][tap x][padded output]     one copy, read by both stages
//     terms     per convolution on Tensor Cores: offsets of each term of a sum
//     d         per layer  beliefs as deviations, with the halo that the layer above reads
//     delta     per layer  errors at the product's output, with the halo that the feedback reads
//                          (in the Gram form of layer 2 its sum S instead; docs/method.md fact 7)
//     uhat      per layer  pre-activations of the forward pass
//     velocity  per layer  of d, or of S, where beliefs move with momentum
//     top       vhat, target and target_sum of the output layer
//     scratch   partial sums of a stage's split-K products
//
// An iteration has two stages (two-stage iteration, fact 5); each computes products into the scratch, then pointwise work:
//
//     products s = W d  | bar | s -> error, delta, d += eta error | bar | products r = W^T delta | bar | d -= eta r | bar
//
// Only the last step reads d and r at the same element, so no error is kept.
#pragma once

#include <cstdint>

#include "../codes.h"
#include "geometry.h"

namespace pcfast::resident {

// The two stages of an iteration (docs/method.md fact 5).
enum class Stage { kPredict, kFeedback };

enum ProductKind : int32_t {
  kNoProduct = 0,
  kCopy = 1,    // a layer without weights: what it reads is copied
  kConv = 2,    // a convolution, or its transpose in the feedback
  kLinear = 3,  // a linear layer, or its transpose in the feedback
};

// What products read: the state as it is, or rounded for Tensor Cores. Weights of linear layers are kept in bfloat16 for
// kBf16; all other weights are kept in the state's type, rounded.
enum OperandKind : int32_t { kIeee = 0, kTf32 = 1, kBf16 = 2 };

// A strided view of an array in shared memory: element (sample, channel, y, x) lies at
// first + sample * samples + channel * channels + y * rows + x * columns.
struct StridedView {
  int32_t first, samples, channels, rows, columns;
};

// Gives quotients by `value` without a division: the upper 32 bits of (n + 1) * multiplier, exact where (n + 1) * value is
// at most 2^32. A block has fewer than 2^16 elements (kMaxElements).
struct Divisor {
  int32_t value;
  uint32_t multiplier;
};

// C[row][y][x] = sum over (channel, tap_y, tap_x) of A[row][channel, tap_y, tap_x] B[channel, y, x, tap_y, tap_x],
// for every sample. A starts at `weights`, B at `input.first`; steps of B with y and x are input.rows and input.columns,
// with a channel input.channels.
struct Product {
  int32_t kind;
  int32_t out, height, width;         // C
  Divisor by_area, by_width;          // height * width, width
  int32_t channels, taps_y, taps_x;   // the dimensions of the sum
  int32_t weights, weight_row, weight_channel, weight_tap_y, weight_tap_x;
  StridedView input;
  int32_t input_tap_y, input_tap_x;   // steps of B with a tap
  int32_t scratch, scratch_sample, scratch_split;
  // A unit is one warp's work: number (group * by_tiles + tile) * by_splits + split, in a block with all its samples. A
  // group is a group of samples, in kConv of positions; a tile covers rows of A; a split is a part of the sum (split-K).
  int32_t units;
  Divisor by_splits, by_tiles;
  // Channels per split: in linear products a multiple of 4, on Tensor Cores a multiple of a step's depth, and there kConv
  // counts terms instead of channels.
  int32_t split;
  int32_t lanes_log2;                 // kLinear, prediction: lanes over output features; the other lanes share the sum
  int32_t rows_per_thread;            // kConv in IEEE arithmetic: one of kConvRows
  int32_t tiles;                      // Tensor Cores: tiles per unit, along M (kLinear) or along N (kConv)
  int32_t terms, term_count;          // kConv on Tensor Cores: the table of terms, padded to a step's depth
};

struct Layer {
  Product predict;   // of layer 1 kNoProduct: clamped input (fact 2)
  Product feedback;  // gives r of the beliefs below; in Gram form (fact 7) layer 2 has none
  int32_t channels, height, width;    // of the product's output
  int32_t size;                       // elements of the output, pooled, per sample
  Divisor by_area, by_width;          // the output's area, and its width
  // An item is one thread's pointwise work: item group * by_items + index is element `index` of a group of samples.
  // by_items is the size, rounded up to whole warps.
  int32_t items;
  Divisor by_items;
  int32_t pool, window_y, window_x;
  Divisor by_window_x;
  int32_t before, after;              // activations in front of and behind the pool: enum Activation (activations.cuh)
  double before_negative_slope, after_negative_slope;
  int32_t uhat, uhat_sample;          // (channel, y, x) packed; not of layer 1
  int32_t velocity, velocity_sample;  // of its beliefs, packed; in Gram form layer 1's is of S. velocity_sample 0: none
  int32_t operand;                    // of both products
  // The weights in shared memory; the stride counts numbers of the type that is kept there. weight_inputs 0: none to load.
  int32_t weights, weight_inputs, weight_stride;
  int32_t gram;                       // Gram form (fact 7): delta holds S, and weights -G
  StridedView delta;
  StridedView d;                      // of the layer's own output; the output layer has none
};

// layers[0] is layer 1, of which only d, the velocity and the output's sizes count. torch computes its forward pass, and in
// Gram form (fact 7) layer 2's product.
struct Program {
  // samples: samples per thread block. group: samples per lane of a linear product and per thread of pointwise work; it
  // divides samples.
  int32_t depth, samples, group;
  int32_t elements;                   // of shared memory
  int32_t loss, classes;
  int32_t vhat, target, target_sum, classes_stride;
  int32_t first_in_loop;              // 2 in Gram form (fact 7), whose layer 1 has no d; else 1
  Layer layers[kMaxLayers];
};

// Tensors in device memory, contiguous, the batch outermost, scalars of the state's type. Entry l - 1 is layer l's; null
// where there is none.
struct Tensors {
  const void* weight[kMaxLayers];    // (out, in, taps), kBf16: bfloat16; Gram form: G takes the place of layer 2's
  const void* bias[kMaxLayers];
  const void* start[kMaxLayers];     // beliefs before the first iteration; null: those of the forward pass
  const void* vhat_1;                 // null in Gram form
  const void* uhat_2;                 // Gram form
  const int64_t* labels;              // null: `target` holds the targets
  const void* target;                 // (batch, classes): probabilities, or what mse compares with
  const void* class_weight;           // of cross-entropy
  const void* step_sizes;             // (iterations,); null: eta is the same in all
  // Written.
  void* vhat[kMaxLayers];            // from layer 2 on
  void* belief[kMaxLayers];          // after the last iteration
  void* error[kMaxLayers];           // of the last iteration
  void* local_error[kMaxLayers];     // pulled back to the product at the last beliefs; null: not wanted
  void* loss_rows;                    // (batch,): every sample's share of the loss at vhat
  void* output_gradient;              // (batch, classes): the loss's gradient at vhat; null: not wanted
  void* gram_sum;                     // S after the last iteration, packed like uhat of layer 2
  void* gram_sum_before;              // S before the last iteration
  // Per layer, lowered to the iteration whose update left NaN or infinity; the output layer's entry to 0 where a label is
  // out of range.
  int32_t* first_bad;
};

struct RunParams {
  int32_t batch, iterations;
  int32_t fresh;                      // beliefs start at the forward pass: the active front (fact 3) holds
  int32_t mean;                       // cross-entropy: over rows, weighed by their classes
  int32_t every_row;                  // no label may be ignored: the mean is over more rows than the batch's
  int64_t ignored_label;
  double eta, momentum;
  double smoothing;                   // of labels
  double share;                       // of the batch in a mean over more rows
  double loss_scale;                  // mse: of mu - y in the gradient
};

}  // namespace pcfast::resident
