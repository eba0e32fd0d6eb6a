// One backward pass of a network of linear layers that are too wide for a core's cache: exact, and fixed prediction in its
// closed form (docs/method.md fact 1). The products are a BLAS's, torch's own, over the whole batch; what stands between
// two of them (bias, activation, derivative, bias gradient, checks) is one pass over a block of rows.
//
// Arrays are as torch's, a row a sample. Blocks do not depend on the number of threads, and sums over them have one order.
#pragma once

#include "group.h"

PCFAST_BEGIN

// Fortran's xGEMM, column by column. Integers are given in 64 bits, of which a BLAS of 32-bit integers reads the lower.
template <class T>
using Gemm = void (*)(const char* transpose_a, const char* transpose_b, const int64_t* m, const int64_t* n, const int64_t* k,
                      const T* alpha, const T* a, const int64_t* lda, const T* b, const int64_t* ldb, const T* beta, T* c,
                      const int64_t* ldc);

template <class T>
class RowPass {
 public:
  // threads: how many may call the bodies of operator()'s for_each.
  RowPass(const Shared<T>& shared, int threads, Arena& arena)
      : shared_(shared), call_(shared.call), gemm_(reinterpret_cast<Gemm<T>>(const_cast<void*>(call_.gemm))) {
    const int64_t batch = call_.batch;
    blocks_ = (batch + kRows - 1) / kRows;
    layers_ = arena.take<State>(call_.depth + 1);
    int widest = 0;
    for (int l = 1; l <= call_.depth; ++l) {
      const Layer& layer = at(l);
      const size_t size = padded(batch * layer.inner().channels);
      widest = layer.inner().channels > widest ? layer.inner().channels : widest;
      State state{};
      state.base = arena.take<T>(size * (1 + saved_planes(layer.tail.before.kind)));
      state.value = in_place(layer) ? state.base : arena.take<T>(size);
      if (arena.at != nullptr) layers_[l] = state;
    }
    delta_ = arena.take<T>(padded(batch * widest));
    error_ = arena.take<T>(padded(batch * widest));
    bias_sums_ = arena.take<T>(blocks_ * widest);
    squares_ = arena.take<double>(blocks_);
    for (T*& scratch : scratch_) scratch = arena.take<T>(padded(kRows * widest) * threads);
    scratch_step_ = padded(kRows * widest);
  }

  // ForEach(count, body) calls body(index, thread) for every index; loss_of(mu, error): the loss's gradient at the outputs.
  template <class ForEach, class LossOf>
  void operator()(ForEach for_each, LossOf loss_of) {
    const int depth = call_.depth;
    for (int l = 1; l <= depth; ++l) forward(l, for_each);
    loss_of(layers_[depth].value, error_);
    int lowest = 1;
    while (lowest < depth && !tensors(lowest).trained()) ++lowest;
    for (int l = depth; l >= lowest; --l) {
      pull_back_tail(l, for_each);
      if (tensors(l).trained()) update(l);
      if (l > lowest) feed_back(l);
    }
  }

 private:
  struct State {
    T *base, *value;  // uhat and what is saved with it; vhat
    double square;    // |vhat|^2
  };
  static constexpr int64_t kRows = 16;
  static constexpr T kLargest = sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308);

  const Layer& at(int l) const { return call_.layers[l - 1]; }
  const LayerTensors& tensors(int l) const { return call_.tensors[l - 1]; }
  static size_t padded(size_t count) { return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  // Their derivative follows from their value.
  static bool in_place(const Layer& layer) {
    return layer.tail.before.kind == kIdentity || layer.tail.before.kind == kRelu;
  }

  void multiply(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t lda,
                const T* b, int64_t ldb, T* c) const {
    const T beta = 0;
    gemm_(&transpose_a, &transpose_b, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &m);
  }

  // body(first, count, block, thread): of the elements of a block of rows.
  template <class ForEach, class Body>
  void for_each_block(int features, ForEach& for_each, Body body) {
    const int64_t batch = call_.batch;
    for_each(blocks_, [&](int64_t block, int thread) {
      const int64_t first = block * kRows, rows = batch - first < kRows ? batch - first : kRows;
      body(size_t(first) * features, size_t(rows) * features, block, thread);
    });
  }

  // The sum of the blocks' squares; what is not finite is noted: a sum that is finite says that all is.
  double square_of(const T* values, size_t count, int64_t stage, int layer) const {
    double sum = 0;
    for (int64_t block = 0; block < blocks_; ++block) sum += squares_[block];
    if (!(sum <= kLargest) && !all_finite(values, count)) note_first_bad(call_, stage, layer);
    return sum;
  }
  static double square(const T* values, size_t count) {
    Vector<T> sum = {};
    size_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) sum += load(values + i) * load(values + i);
    double result = sum_of_lanes<T>(sum);
    for (; i < count; ++i) result += double(values[i]) * double(values[i]);
    return result;
  }
  static bool all_finite(const T* values, size_t count) {
    T bad = 0;
    for (size_t i = 0; i < count; ++i) bad += values[i] * T(0);
    return bad == bad;
  }

  template <class ForEach>
  void forward(int l, ForEach& for_each) {
    const Layer& layer = at(l);
    State& state = layers_[l];
    const int64_t in = layer.below().size(), out = layer.inner().channels;
    const size_t plane = padded(call_.batch * out);
    const T *below = l > 1 ? layers_[l - 1].value : static_cast<const T*>(call_.x), *bias = static_cast<const T*>(tensors(l).bias);
    multiply('T', 'N', out, call_.batch, in, T(1), static_cast<const T*>(tensors(l).weight), in, below, in, state.base);
    for_each_block(out, for_each, [&](size_t first, size_t count, int64_t block, int) {
      T* u = state.base + first;
      if (bias != nullptr)
        for (size_t row = 0; row < count; row += out)
          for (int64_t i = 0; i < out; ++i) u[row + i] += bias[i];
      if (layer.tail.before.kind != kIdentity)
        activate<T>(layer.tail.before, u, count, state.value + first, in_place(layer) ? nullptr : u + plane, plane);
      squares_[block] = square(state.value + first, count);
    });
    state.square = square_of(state.value, call_.batch * out, kForwardStage, l);
    if (l == call_.depth) __builtin_memcpy(tensors(l).vhat, state.value, call_.batch * out * sizeof(T));
  }

  // delta: the error of layer l pulled back to its product; the sums of its columns, which are the bias's gradient.
  template <class ForEach>
  void pull_back_tail(int l, ForEach& for_each) {
    const Layer& layer = at(l);
    const State& state = layers_[l];
    const int64_t out = layer.inner().channels;
    const size_t plane = padded(call_.batch * out);
    for_each_block(out, for_each, [&](size_t first, size_t count, int64_t block, int thread) {
      T *still = scratch_[0] + thread * scratch_step_, *derivative = scratch_[1] + thread * scratch_step_;
      if (l < call_.depth && !all_finite(error_ + first, count)) note_first_bad(call_, kFirstIterationStage, l);
      __builtin_memset(still, 0, padded(count) * sizeof(T));
      act_diffs<T>(layer.tail.before, state.base + first, plane, still, count, still, derivative);
      for (size_t i = 0; i < count; ++i) delta_[first + i] = error_[first + i] * derivative[i];
      T* sums = bias_sums_ + block * out;
      __builtin_memcpy(sums, delta_ + first, out * sizeof(T));
      for (size_t row = out; row < count; row += out)
        for (int64_t i = 0; i < out; ++i) sums[i] += delta_[first + row + i];
      squares_[block] = square(delta_ + first, count);
    });
    delta_square_ = square_of(delta_, call_.batch * out, kFirstIterationStage, l);
  }

  void update(int l) {
    const int64_t in = at(l).below().size(), out = at(l).inner().channels;
    const T factor = T(call_.factors[l - 1]);
    if (T* bias = static_cast<T*>(tensors(l).bias_gradient); bias != nullptr) {
      for (int64_t i = 0; i < out; ++i) {
        T sum = 0;
        for (int64_t block = 0; block < blocks_; ++block) sum += bias_sums_[block * out + i];
        bias[i] = sum * factor;
      }
      if (!all_finite(bias, out)) note_first_bad(call_, kFirstIterationStage, l);
    }
    T* weight = static_cast<T*>(tensors(l).weight_gradient);
    if (weight == nullptr) return;
    const T* below = l > 1 ? layers_[l - 1].value : static_cast<const T*>(call_.x);
    multiply('N', 'T', in, out, call_.batch, factor, below, in, delta_, out, weight);
    // |sum_n delta_ni v_nj| <= |delta| |v|, and so is every part of the sum
    const double bound = delta_square_ * (l > 1 ? layers_[l - 1].square : square(below, call_.batch * in)) * factor * factor;
    if (!(bound <= kLargest) && !all_finite(weight, in * out)) note_first_bad(call_, kFirstIterationStage, l);
  }

  void feed_back(int l) {
    const int64_t in = at(l).below().size(), out = at(l).inner().channels;
    multiply('N', 'N', in, call_.batch, out, T(1), static_cast<const T*>(tensors(l).weight), in, delta_, out, error_);
  }

  const Shared<T>& shared_;
  const Call& call_;
  const Gemm<T> gemm_;
  State* layers_;
  T *delta_, *error_, *bias_sums_, *scratch_[2];
  double *squares_, delta_square_ = 0;
  int64_t blocks_;
  size_t scratch_step_;
};

PCFAST_END
