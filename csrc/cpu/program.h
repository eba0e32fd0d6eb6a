// What a relaxation on the CPU reads and writes. Plain C++17: every instruction set's object file and the module share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../codes.h"

namespace pcfast::cpu {

enum Kind : int { kNothing = 0, kLinear = 1, kConvolution = 2 };

struct Map {
  int channels, height, width;

  int positions() const { return height * width; }
  int size() const { return channels * positions(); }
};

struct Activation {
  int kind;
  double negative_slope;
};

struct Pool {
  int kind, window_y, window_x, stride_y, stride_x, padding_y, padding_x;
  int divisor;          // of an average; 0: its elements
  bool counts_padding;  // those in the padding as well

  int window() const { return window_y * window_x; }
};

// What needs no product: an activation, a pool or nothing, an activation.
struct Pointwise {
  Map from, to;
  Activation before;
  Pool pool;
  Activation after;

  bool pools() const { return pool.kind != kNoPool; }
  bool acts() const { return before.kind != kIdentity || pools() || after.kind != kIdentity; }
};

// A PC layer: entry(v_{l-1}), a product or nothing, and the tail. With a skip, which no pool has, it adds what it reads.
// Features are a map of one position.
struct Layer {
  int kind;
  Pointwise entry;
  int kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x;
  Pointwise tail;
  bool skip;
  double scale;  // of the product and its bias

  // What the product reads, what it gives, what the layer gives.
  const Map& below() const { return entry.to; }
  const Map& inner() const { return tail.from; }
  const Map& out() const { return tail.to; }
  int taps() const { return kernel_y * kernel_x; }
};

// Pointers of one layer; null where there is nothing. Arrays over the batch have a row per sample.
struct LayerTensors {
  const void *weight, *bias, *start;
  void *vhat, *belief, *error, *weight_gradient, *bias_gradient;

  bool trained() const { return weight_gradient != nullptr || bias_gradient != nullptr; }
};

// Stages of Report::key, in the order in which what is not finite is reported.
constexpr int kForwardStage = 0, kLossStage = 1, kFirstIterationStage = 2;
constexpr int64_t kStage = int64_t{1} << 20;  // layers a stage
constexpr int64_t kAllFinite = INT64_MAX;

// One call. Lists run over layers 1..depth, from index 0.
struct Call {
  const Layer* layers;
  int depth, threads;
  int64_t batch, iterations;
  bool relaxes;  // else one backward pass: exact, fixed prediction
  bool fresh;    // from the forward pass, not from given beliefs
  bool gram;     // the clamped layer in Gram form (docs/method.md fact 7)
  bool updates;  // local errors and weight gradients are wanted
  const double* step_sizes;  // of every iteration
  const double* factors;     // of every layer's local error, in a backward pass
  double momentum;

  int loss;
  bool mean, every_row;  // cross-entropy: the reduction; whether an ignored label is invalid
  int64_t ignored_label;
  double smoothing, share, loss_scale;
  const int64_t* labels;
  const void *target, *class_weight;

  const void* gemm;  // of torch's BLAS: the products of one backward pass (row_pass.h); null for kernels' own

  const void* x;
  const LayerTensors* tensors;
  void *loss_value, *output_gradient;

  // Written: kStage * stage + layer of what first was not finite, and whether a label is out of range.
  int64_t* first_bad;
  bool* invalid_label;
};

// Calls body(context) on up to `threads` threads, on the caller's alone where that is 1, and waits for all.
void parallel(int threads, void (*body)(void*), void* context);

// Memory that lasts until it is given back, aligned to 64 bytes, not cleared; kept for the next call.
void* take_workspace(size_t bytes);
void give_back_workspace(void* memory);

}  // namespace pcfast::cpu
