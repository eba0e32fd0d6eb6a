// One lane group of samples, from the forward pass to the local errors: all of its state in one thread's cache.
//
// Deviations d = v - vhat, never beliefs (docs/method.md fact 8). An iteration sweeps from the output down: the prediction
// of layer l reads d_{l-1} before feedback moves it, and feedback into v_l reads delta_{l+1}, so that all layers move at
// once, and errors and local errors live in scratch for two layers.
#pragma once

#include "pointwise.h"
#include "product.h"
#include "rows.h"

PCFAST_BEGIN

template <class T>
struct Packed {
  const T *predict, *feedback;  // of layer 1 none for feedback
};

// What the groups of a call share.
template <class T>
struct Shared {
  const Call& call;
  const Packed<T>* packed;   // by layer
  const T* gram;             // packed; null without Gram form
  // By layer; null where not wanted. Local errors are packed as weights are, samples being the terms; `read` is what the
  // products read, for the updates, where no other array has it.
  T* const* local_error;
  const Rows<T>* read;
  T* const* convolution_gradient;      // by layer: of every vector of lanes, one after another; null where not wanted
  double* loss_rows;
  double label_scale;  // cross-entropy of labels, a mean: its share over the weights of all rows
};

// Weights and biases of a convolution.
inline size_t gradient_count(const Layer& layer) {
  return size_t(layer.inner().channels) * (layer.below().channels * layer.taps() + 1);
}

inline void note_first_bad(const Call& call, int64_t stage, int layer) {
  const int64_t key = stage * kStage + layer;
  int64_t seen = __atomic_load_n(call.first_bad, __ATOMIC_RELAXED);
  while (key < seen && !__atomic_compare_exchange_n(call.first_bad, &seen, key, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// The weight of a row of the batch in a mean of cross-entropy, and its class.
template <class T>
struct Label {
  int index;
  T weight;  // its class's; 0 where the row is ignored
  bool ignored, invalid;
};

template <class T>
Label<T> label_at(const Call& call, int64_t sample) {
  const int classes = call.layers[call.depth - 1].out().size();
  const int64_t label = call.labels[sample];
  const bool ignored = label == call.ignored_label;
  const bool outside = label < 0 || label >= classes;
  const int inside = static_cast<int>(label < 0 ? 0 : label >= classes ? classes - 1 : label);
  const T* weights = static_cast<const T*>(call.class_weight);
  return {inside, ignored ? T(0) : weights ? weights[inside] : T(1), ignored, ignored ? call.every_row : outside};
}

inline double logarithm(double value) { return __builtin_log(value); }

template <class T, int kVectors>
class Group {
 public:
  static constexpr int kWidth = kVectors * kLanes<T>;

  // Memory of one group; the same object serves one group after another.
  Group(const Shared<T>& shared, Arena& arena) : shared_(shared), call_(shared.call) {
    const int depth = call_.depth;
    state_ = arena.take<State>(depth + 1);
    int largest = at(1).entry.from.size();
    bool enters = false;
    for (int l = 1; l <= depth; ++l) {
      const Layer& layer = at(l);
      State state{};
      const size_t out_size = elements(layer.out());
      state.tail.take(layer.tail, arena);
      if (layer.entry.acts()) state.entry.take(layer.entry, arena), enters = true;
      if (layer.skip) state.vhat = arena.take<T>(out_size);
      state.error = arena.take<T>(out_size);
      if (call_.relaxes && l < depth) {
        const bool outside = call_.gram && l == 1;  // its beliefs leave the loop
        const size_t size = outside ? elements(at(2).inner()) : out_size;
        state.d = arena.take<T>(out_size);
        if (outside) {
          s_ = arena.take<T>(size);
          sum_ = arena.take<T>(size);
          sum_before_ = arena.take<T>(size);
          if (momentum()) sum_velocity_ = arena.take<T>(size);
        }
        if (momentum()) state.velocity = arena.take<T>(size);
      }
      if (arena.at != nullptr) state_[l] = state;
      const int sizes[] = {layer.below().size(), layer.inner().size(), layer.out().size()};
      for (const int size : sizes) largest = size > largest ? size : largest;
    }
    T** const buffers[] = {&scratch_, &derivative_, &product_, &delta_[0], &delta_[1]};
    for (T** buffer : buffers) *buffer = arena.take<T>(size_t(largest) * kWidth);
    T* of_entries[2];
    for (T*& derivative : of_entries) derivative = arena.take<T>(enters ? size_t(largest) * kWidth : 0);
    if (arena.at != nullptr)  // those of two layers next to each other are in use at a time, of tails one's
      for (int l = 1; l <= depth; ++l) state_[l].tail.derivative = derivative_, state_[l].entry.derivative = of_entries[l % 2];
    const size_t classes = size_t(at(depth).out().size()) * kWidth;
    output_ = arena.take<T>(classes);
    target_ = arena.take<T>(classes);
    target_sum_ = arena.take<T>(kWidth);
  }

  // Of a network of one layer, whose outputs are given: the loss's gradient there, and the samples' losses.
  void output_error_of(int64_t first_sample, Rows<const T> outputs, Rows<T> error) {
    begin(first_sample);
    const int classes = at(1).out().size();
    gather<T, kWidth>(outputs.from(first_sample), samples_, classes, output_);
    load_target();
    output_error(/*moved=*/nullptr, kLossStage);
    put(state_[1].error, classes, error.from(first_sample));
  }

  void run(int64_t first_sample) {
    begin(first_sample);
    forward();
    load_target();
    output_error(/*moved=*/nullptr, kLossStage);
    if (call_.output_gradient != nullptr)
      put(state_[call_.depth].error, at(call_.depth).out().size(), given_rows(call_.output_gradient, call_.depth));
    if (call_.relaxes) {
      start();
      relax();
      finish();
    } else {
      pull_back_once();
    }
  }

 private:
  void begin(int64_t first_sample) {
    first_ = first_sample;
    const int64_t left = call_.batch - first_sample;
    samples_ = static_cast<int>(left < kWidth ? left : kWidth);
  }

  struct State {
    PointwiseState<T, kVectors> entry, tail;
    T *error, *d, *velocity;
    T* vhat;  // of a layer with a skip
  };

  const Layer& at(int l) const { return call_.layers[l - 1]; }
  const LayerTensors& tensors(int l) const { return call_.tensors[l - 1]; }
  bool momentum() const { return call_.momentum != 0; }
  static size_t elements(const Map& map) { return size_t(map.size()) * kWidth; }
  static void clear(T* memory, size_t count) { __builtin_memset(memory, 0, count * sizeof(T)); }

  Rows<T> given_rows(void* memory, int l) const {
    return Rows<T>{static_cast<T*>(memory), size_t(at(l).out().size())}.from(first_);
  }
  void put(const T* group, int features, Rows<T> rows) const { scatter<T, kWidth>(group, samples_, features, rows); }

  // Values that are not finite make `bad` NaN in their lane: of lanes with a sample one is enough.
  void check(Vector<T> (&bad)[kVectors], int64_t stage, int layer) const {
    for (int n = 0; n < samples_; ++n)
      if (const T lane = bad[n / kLanes<T>][n % kLanes<T>]; lane != lane) return note_first_bad(call_, stage, layer);
  }
  void check(const T* values, size_t count, int64_t stage, int layer) const {
    Vector<T> bad[kVectors] = {};
    for (size_t i = 0; i < count; i += kWidth)
      for (int j = 0; j < kVectors; ++j) bad[j] += load(values + i + j * kLanes<T>) * T(0);
    check(bad, stage, layer);
  }

  // ---- a layer

  // The product of layer l with `from`, in `to`; finish(first, count) as its parts are complete.
  template <class Finish>
  PCFAST_INLINE void predict(int l, const T* from, T* to, Finish finish) {
    const Layer& layer = at(l);
    if (layer.kind == kNothing) {
      __builtin_memcpy(to, from, elements(layer.inner()) * sizeof(T));
      finish(size_t(0), elements(layer.inner()));
    } else if (layer.kind == kLinear) {
      multiply_linear<T, kVectors>(shared_.packed[l - 1].predict, layer.inner().channels, layer.below().size(), from, to, finish);
    } else {
      multiply_taps<T, kVectors>(shared_.packed[l - 1].predict, layer.below().channels * layer.taps(), layer.inner(), from, to,
                                 [&](int y, int x) { return predict_taps(layer, layer.below(), y, x); }, finish);
    }
  }

  // The transposed product with `delta`, in product_; finish(first, count) as parts of it are complete.
  template <class Finish>
  PCFAST_INLINE void multiply_back(int l, const T* delta, Finish finish) {
    const Layer& layer = at(l);
    const T* weights = shared_.packed[l - 1].feedback;
    if (layer.kind == kLinear)
      multiply_linear<T, kVectors>(weights, layer.below().size(), layer.inner().channels, delta, product_, finish);
    else
      multiply_taps<T, kVectors>(weights, layer.inner().channels * layer.taps(), layer.below(), delta, product_,
                                 [&](int y, int x) { return feedback_taps(layer, layer.inner(), y, x); }, finish);
  }

  // J_l^T eps_l, from `delta`, which is eps_l pulled back to the product; finish(r, first, count) as parts of it are complete
  // at r. The entry is at the point of the last deviate_entry; a skip adds the layer's error.
  template <class Finish>
  PCFAST_INLINE void feed_back(int l, const T* delta, Finish finish) {
    const Layer& layer = at(l);
    if (layer.kind == kNothing) return finish(delta, size_t(0), elements(layer.below()));
    if (layer.entry.pools()) {
      multiply_back(l, delta, [](size_t, size_t) {});
      state_[l].entry.pull_back(layer.entry, product_, scratch_, product_);
      return finish(scratch_, size_t(0), elements(layer.entry.from));
    }
    const T* derivative = layer.entry.acts() ? state_[l].entry.derivative : nullptr;
    const T* skip = layer.skip ? state_[l].error : nullptr;
    multiply_back(l, delta, [&](size_t first, size_t count) {
      T* r = product_;
      if (derivative != nullptr)
        for (size_t i = first; i < first + count; i += kLanes<T>) store(r + i, load(r + i) * load(derivative + i));
      if (skip != nullptr)
        for (size_t i = first; i < first + count; i += kLanes<T>) store(r + i, load(r + i) + load(skip + i));
      finish(r, first, count);
    });
  }

  // vhat_l at the start, into `out`; below: vhat_{l-1}.
  void activate_layer(int l, T* out, const T* below) {
    const Layer& layer = at(l);
    State& state = state_[l];
    state.tail.begin(layer.tail, out, scratch_);
    if (!layer.skip) return;
    for (size_t i = 0; i < elements(layer.out()); i += kLanes<T>) store(out + i, load(out + i) + load(below + i));
    __builtin_memcpy(state.vhat, out, elements(layer.out()) * sizeof(T));
  }
  // The same once more.
  void vhat(int l, T* out) const {
    if (at(l).skip)
      __builtin_memcpy(out, state_[l].vhat, elements(at(l).out()) * sizeof(T));
    else
      state_[l].tail.again(at(l).tail, out);
  }

  // The deviation of what layer l's product reads, from that of v_{l-1}, null where nothing has moved; and the entry's
  // derivatives there, which stay until those of layer l - 2 or l + 2 are asked for. It may lie in product_.
  const T* deviate_entry(int l, const T* d) {
    const Pointwise& entry = at(l).entry;
    if (!entry.acts()) return d;
    if (d == nullptr) clear(product_, elements(entry.from));
    state_[l].entry.deviate(entry, d == nullptr ? product_ : d, product_, scratch_);
    return product_;
  }

  // f_l's deviation, in the place of s, that of its pre-activation; and its derivatives there.
  void deviate_tail(int l, T* s) { state_[l].tail.deviate(at(l).tail, s, s, product_); }

  // delta = the error pulled back to the layer's product, at the point of the last deviate_tail.
  void pull_back_tail(int l, const T* error, T* delta) { state_[l].tail.pull_back(at(l).tail, error, delta, product_); }

  // ---- the forward pass and the loss

  void input(T* out) const {
    gather<T, kWidth>(Rows<const T>{static_cast<const T*>(call_.x), size_t(at(1).entry.from.size())}.from(first_), samples_,
                      at(1).entry.from.size(), out);
  }

  void forward() {
    T *value = delta_[0], *next = delta_[1];
    input(value);
    for (int l = 1; l <= call_.depth; ++l) {
      const Layer& layer = at(l);
      State& state = state_[l];
      const T *bias = static_cast<const T*>(tensors(l).bias), scale = T(layer.scale);
      const size_t channel = size_t(layer.inner().positions()) * kWidth;
      const T* entering = value;
      if (layer.entry.acts()) {
        __builtin_memcpy(state.entry.base, value, elements(layer.entry.from) * sizeof(T));
        state.entry.begin(layer.entry, scratch_, product_);
        entering = scratch_;
      }
      if (!call_.relaxes || l == 1) leave_read(l, entering);
      T* base = state.tail.base;
      predict(l, entering, base, [&](size_t first, size_t count) {
        if (bias == nullptr) return;
        for (size_t c = first / channel; c < (first + count) / channel; ++c)
          for (size_t i = c * channel; i < (c + 1) * channel; i += kLanes<T>)
            store(base + i, load(base + i) + bias[c] * scale);
      });
      T* out = l == call_.depth ? output_ : next;
      activate_layer(l, out, value);
      check(out, elements(layer.out()), kForwardStage, l);
      if (tensors(l).vhat != nullptr) put(out, layer.out().size(), given_rows(tensors(l).vhat, l));
      next = value;
      value = out;
    }
  }

  // Cross-entropy is -sum_c target[c] log_softmax(mu)[c] (pcfast/losses.py), target_sum the sum of target; mse compares
  // with target. Lanes without a sample have target 0 and target_sum 0, and mse's target is the output: no error.
  void load_target() {
    const int classes = at(call_.depth).out().size();
    const T* given = static_cast<const T*>(call_.target);
    const T* weights = static_cast<const T*>(call_.class_weight);
    const T own = T(1 - call_.smoothing), spread = T(call_.smoothing / classes);
    clear(target_sum_, kWidth);
    for (int n = 0; n < kWidth; ++n) {
      const int64_t sample = first_ + n;
      const bool there = n < samples_;
      const Label<T> label = there && call_.labels != nullptr ? label_at<T>(call_, sample) : Label<T>{};
      for (int c = 0; c < classes; ++c) {
        T target = 0;
        if (call_.loss == kMse) {
          target = there ? given[sample * classes + c] : output_[size_t(c) * kWidth + n];
        } else if (there && call_.labels != nullptr) {
          target = label.index == c ? label.weight * own : T(0);
          if (!label.ignored) target += (weights ? weights[c] : T(1)) * spread;
          target *= T(shared_.label_scale);
        } else if (there) {
          const T scale = call_.mean ? T(call_.share) / T(call_.batch) : T(1);
          target = (given[sample * classes + c] * own + spread) * (weights ? weights[c] : T(1)) * scale;
        }
        target_[size_t(c) * kWidth + n] = target;
        target_sum_[n] += target;
      }
    }
  }

  // The loss's gradient at mu = vhat_L + moved, in error[L]; without `moved`, at vhat_L, with the samples' losses.
  void output_error(const T* moved, int64_t stage) {
    const int depth = call_.depth, classes = at(depth).out().size();
    T* error = state_[depth].error;
    Vector<T> bad[kVectors] = {};
    for (int j = 0; j < kVectors; ++j) {
      const size_t lane = size_t(j) * kLanes<T>;
      const auto mu = [&](int c) {
        const size_t i = size_t(c) * kWidth + lane;
        return moved == nullptr ? load(output_ + i) : load(output_ + i) + load(moved + i);
      };
      Vector<T> loss = {};
      if (call_.loss == kMse) {
        const T scale = T(call_.loss_scale), half = T(call_.loss_scale / 2);
        for (int c = 0; c < classes; ++c) {
          const size_t i = size_t(c) * kWidth + lane;
          const Vector<T> difference = mu(c) - load(target_ + i);
          store(error + i, difference * scale);
          loss += difference * difference * half;
          bad[j] += load(error + i) * T(0);
        }
      } else {
        Vector<T> highest = mu(0), sum = {};
        for (int c = 1; c < classes; ++c) highest = mu(c) > highest ? mu(c) : highest;
        for (int c = 0; c < classes; ++c) {
          const Vector<T> e = exp<T>(mu(c) - highest);
          store(error + size_t(c) * kWidth + lane, e);
          sum += e;
        }
        Vector<T> log_sum = {};
        if (moved == nullptr)
          for (int n = 0; n < kLanes<T>; ++n) log_sum[n] = T(logarithm(double(sum[n])));
        const Vector<T> share = load(target_sum_ + lane);
        for (int c = 0; c < classes; ++c) {
          const size_t i = size_t(c) * kWidth + lane;
          const Vector<T> target = load(target_ + i);
          store(error + i, load(error + i) / sum * share - target);
          // a class of probability 0 that the target does not name costs nothing
          if (moved == nullptr) loss -= target != 0 ? target * ((mu(c) - highest) - log_sum) : Vector<T>{};
          bad[j] += load(error + i) * T(0);
        }
      }
      if (moved != nullptr) continue;
      bad[j] += loss * T(0);
      for (int n = 0; n < kLanes<T>; ++n)
        if (int(lane) + n < samples_) shared_.loss_rows[first_ + lane + n] = double(loss[n]);
    }
    check(bad, stage, stage == kLossStage ? 0 : depth);
  }

  // ---- the iterations

  void start() {
    for (int l = 1; l <= call_.depth; ++l) {
      State& state = state_[l];
      const size_t size = elements(at(l).out());
      if (l == call_.depth) continue;
      clear(state.error, size);
      clear(state.d, size);
      if (call_.gram && l == 1) {
        const size_t inner = elements(at(2).inner());
        clear(s_, inner);
        clear(sum_, inner);
        clear(sum_before_, inner);
        if (momentum()) {
          clear(state.velocity, inner);
          clear(sum_velocity_, inner);
        }
        continue;
      }
      if (momentum()) clear(state.velocity, size);
      if (tensors(l).start == nullptr) continue;
      gather<T, kWidth>(
          Rows<const T>{static_cast<const T*>(tensors(l).start), size_t(at(l).out().size())}.from(first_), samples_,
          at(l).out().size(), state.d);
      vhat(l, product_);
      for (size_t i = 0; i < size; i += kLanes<T>) store(state.d + i, load(state.d + i) - load(product_ + i));
      for (int n = samples_; n < kWidth; ++n)
        for (size_t i = n; i < size; i += kWidth) state.d[i] = 0;
    }
  }

  void relax() {
    const int depth = call_.depth;
    for (int64_t t = 1; t <= (call_.iterations > 0 ? call_.iterations : 1); ++t) {
      last_ = t >= call_.iterations;
      moves_ = call_.iterations > 0;
      eta_ = moves_ ? T(call_.step_sizes[t - 1]) : T(0);
      stage_ = kFirstIterationStage + t - 1;
      // the lowest layer with an error, and the lowest whose beliefs move (active front, docs/method.md fact 3)
      const int64_t lowest = call_.fresh ? depth - t + 1 : 1;
      const int front = static_cast<int>(lowest > 1 ? lowest : 1);
      const int moving = static_cast<int>(lowest - 1 > 1 ? lowest - 1 : 1);
      for (int l = depth; l >= (moves_ ? moving : front); --l) {
        if (call_.gram && l == 1) continue;
        delta_now_ = delta_[l % 2];
        // the prediction has moved where the beliefs below it had before this iteration
        const bool moved = l > 1 && (!call_.fresh || l > front);
        if (l == depth)
          top(moved);
        else if (l >= front)
          hidden(l, moved);
        if (!moves_ || l == depth) continue;
        descend(l);
        if (call_.gram && l == 2 && l >= front) descend_gram();
      }
      // layer 2 is the output's
      if (call_.gram && depth == 2 && moves_) descend_gram();
    }
  }

  // s_l = W_l d_{l-1}, or zero where nothing has moved; finish(s, first, count) as parts of it are complete at s.
  template <class Finish>
  PCFAST_INLINE void predict_deviation(int l, bool moved, Finish finish) {
    const size_t inner = elements(at(l).inner());
    if (moved && call_.gram && l == 2) return finish(s_, size_t(0), inner);
    const auto complete = [&](size_t first, size_t count) { finish(scratch_, first, count); };
    const T* entering = l > 1 ? deviate_entry(l, moved ? state_[l - 1].d : nullptr) : nullptr;
    if (moved) return predict(l, entering, scratch_, complete);
    clear(scratch_, inner);
    complete(size_t(0), inner);
  }
  // The same, in scratch_.
  void predict_to_scratch(int l, bool moved) {
    predict_deviation(l, moved, [&](const T* s, size_t first, size_t count) {
      if (s != scratch_) __builtin_memcpy(scratch_ + first, s + first, count * sizeof(T));
    });
  }

  void top(bool moved) {
    const int l = call_.depth;
    predict_to_scratch(l, moved);
    deviate_tail(l, scratch_);
    if (at(l).skip && moved)
      for (size_t i = 0; i < elements(at(l).out()); i += kLanes<T>)
        store(scratch_ + i, load(scratch_ + i) + load(state_[l - 1].d + i));
    output_error(scratch_, stage_);
    pull_back_tail(l, state_[l].error, delta_now_);
  }

  // eps_l = (mu_l - vhat_l) - d_l; its part of the update of d_l; delta_l
  void hidden(int l, bool moved) {
    const Layer& layer = at(l);
    if (l == 1) {
      clear(scratch_, elements(layer.out()));
      take_errors(1, scratch_);  // nothing below it moves: no delta
      return;
    }
    const State& state = state_[l];
    const size_t inner = elements(layer.inner());
    if (!layer.tail.pools()) {
      const T* skip = layer.skip && moved ? state_[l - 1].d : nullptr;
      predict_deviation(l, moved, [&](const T* s, size_t first, size_t count) {
        for_each_act_diff<T>(layer.tail.before, state.tail.base + first, inner, s + first, count,
                             [&](size_t i, const ActDiff<T>& at) {
                               const size_t k = first + i;
                               const auto moved = skip == nullptr ? at.act_diff : at.act_diff + load(skip + k);
                               store(delta_now_ + k, take_error(state, moved, k) * at.derivative);
                             });
      });
      return;
    }
    predict_to_scratch(l, moved);
    deviate_tail(l, scratch_);
    take_errors(l, scratch_);
    pull_back_tail(l, scratch_, delta_now_);
  }

  // eps of the vector of elements at i, where mu - vhat is `moved`; d moves along it.
  PCFAST_INLINE Vector<T> take_error(const State& state, Vector<T> moved, size_t i) {
    const Vector<T> d = load(state.d + i), error = moved - d;
    if (momentum())
      store(state.velocity + i, load(state.velocity + i) * T(call_.momentum) - error);
    else
      store(state.d + i, d + error * eta_);
    if (last_ || state.vhat != nullptr) store(state.error + i, error);
    return error;
  }
  void take_errors(int l, T* moved) {
    const State& state = state_[l];
    for (size_t i = 0; i < elements(at(l).out()); i += kLanes<T>) store(moved + i, take_error(state, load(moved + i), i));
  }

  // d_l -= eta J^T eps_{l+1}
  void descend(int l) {
    const State& state = state_[l];
    const T eta = eta_;
    const bool with_velocity = momentum();
    Vector<T> bad[kVectors] = {};
    feed_back(l + 1, delta_[(l + 1) % 2], [&](const T* r, size_t first, size_t count) {
      for (size_t i = first; i < first + count; i += kWidth)
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          const size_t k = i + size_t(j) * kLanes<T>;
          Vector<T> step = load(r + k);
          if (with_velocity) {
            step = load(state.velocity + k) + step;
            store(state.velocity + k, step);
          }
          const Vector<T> d = load(state.d + k) - step * eta;
          store(state.d + k, d);
          bad[j] += d * T(0);
        }
    });
    check(bad, stage_, l);
  }

  // Gram form of the clamped layer (docs/method.md fact 7):  s <- (1 - eta) s - eta delta_2 G,  S <- (1 - eta) S + eta delta_2;
  // with momentum both descend along s + delta_2 G and S - delta_2.
  void descend_gram() {
    const Layer& layer = at(2);
    const T* delta = delta_[0];
    const size_t inner = elements(layer.inner());
    const T eta = eta_, kept = T(1) - eta_, decay = T(call_.momentum);
    T* velocity = state_[1].velocity;
    if (last_) __builtin_memcpy(sum_before_, sum_, inner * sizeof(T));
    for (size_t i = 0; i < inner; i += kLanes<T>) {
      const Vector<T> sum = load(sum_ + i), now = load(delta + i);
      if (momentum()) {
        const Vector<T> step = load(sum_velocity_ + i) * decay + (sum - now);
        store(sum_velocity_ + i, step);
        store(sum_ + i, sum - step * eta);
      } else {
        store(sum_ + i, sum * kept + now * eta);
      }
    }
    Vector<T> bad[kVectors] = {};
    const auto finish = [&](size_t first, size_t count) {
      for (size_t i = first; i < first + count; i += kWidth)
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          const size_t k = i + size_t(j) * kLanes<T>;
          const Vector<T> r = load(product_ + k), before = load(s_ + k);
          Vector<T> s;
          if (momentum()) {
            const Vector<T> step = load(velocity + k) * decay + (before + r);
            store(velocity + k, step);
            s = before - step * eta;
          } else {
            s = before * kept - r * eta;
          }
          store(s_ + k, s);
          bad[j] += s * T(0);
        }
    };
    if (layer.kind == kLinear) {
      multiply_linear<T, kVectors>(shared_.gram, layer.inner().channels, layer.inner().channels, delta, product_, finish);
    } else {
      // the kernel correlated with itself, over the map with a border of k - 1
      Layer own = layer;
      own.kernel_y = 2 * layer.kernel_y - 1, own.kernel_x = 2 * layer.kernel_x - 1;
      own.padding_y = layer.kernel_y - 1, own.padding_x = layer.kernel_x - 1;
      multiply_taps<T, kVectors>(shared_.gram, layer.inner().channels * own.taps(), layer.inner(), delta, product_,
                                 [&](int y, int x) { return predict_taps(own, layer.inner(), y, x); }, finish);
    }
    check(bad, stage_, 1);
  }

  // ---- what is left after the iterations

  // Layer 1's beliefs and last error, which Gram form has kept out of the loop: d_1 = -S W_2, eps_1 = S_before W_2.
  void leave_gram_form() {
    State& state = state_[1];
    feed_back(2, sum_, [&](const T* r, size_t first, size_t count) {
      for (size_t i = first; i < first + count; i += kLanes<T>) store(state.d + i, -load(r + i));
    });
    feed_back(2, sum_before_, [&](const T* r, size_t first, size_t count) {
      __builtin_memcpy(state.error + first, r + first, count * sizeof(T));
    });
  }

  bool wants_update(int l) const {
    return shared_.local_error[l - 1] != nullptr || shared_.convolution_gradient[l - 1] != nullptr;
  }

  // v_l at the end: v_0 is x.
  void beliefs(int l, T* out) {
    if (l == 0) return input(out);
    vhat(l, out);
    if (!call_.relaxes) return;
    for (size_t i = 0; i < elements(at(l).out()); i += kLanes<T>) store(out + i, load(out + i) + load(state_[l].d + i));
  }

  // What layer l's product reads there.
  void entering(int l, T* out) {
    beliefs(l - 1, out);
    if (at(l).entry.acts()) state_[l].entry.apply(at(l).entry, out, product_);
  }

  void leave_read(int l, const T* entering) {
    if (shared_.read[l - 1].at != nullptr) put(entering, at(l).below().size(), shared_.read[l - 1].from(first_));
  }

  // A linear layer's update sums over the whole batch, later; a convolution's begins here, with the maps in cache.
  void leave_for_update(int l, T* delta, T factor) {
    const Layer& layer = at(l);
    factor *= T(layer.scale);
    if (factor != 1)
      for (size_t i = 0; i < elements(layer.inner()); i += kLanes<T>) store(delta + i, load(delta + i) * factor);
    if (layer.kind == kLinear) {
      const Blocks blocks(layer.inner().channels);
      for (int block = 0; block < blocks.count; ++block) {
        const int first = blocks.begin(block), count = blocks.begin(block + 1) - first;
        T* packed = shared_.local_error[l - 1] + first * call_.batch;
        put(delta + size_t(first) * kWidth, count, Rows<T>{packed, size_t(count)}.from(first_));
      }
      return;
    }
    T* below = delta_[1];
    entering(l, below);
    const size_t count = gradient_count(layer);
    for (int j = 0; j < kVectors && j * kLanes<T> < samples_; ++j)
      convolution_gradient<T, kWidth>(layer, delta + j * kLanes<T>, below + j * kLanes<T>,
                                      shared_.convolution_gradient[l - 1] + (first_ / kLanes<T> + j) * count);
  }

  // Masks and arg-maxima at the last beliefs, errors of the last iteration (Torch2PC's order).
  void finish() {
    const int depth = call_.depth;
    if (call_.gram) leave_gram_form();
    const int64_t stage = kFirstIterationStage + call_.iterations;
    for (int l = 1; l <= depth; ++l) {
      const Layer& layer = at(l);
      const State& state = state_[l];
      check(state.error, elements(layer.out()), stage, l);
      if (tensors(l).error != nullptr) put(state.error, layer.out().size(), given_rows(tensors(l).error, l));
      if (wants_update(l)) {
        predict_to_scratch(l, l > 1);
        deviate_tail(l, scratch_);
        pull_back_tail(l, state.error, delta_[0]);
        leave_for_update(l, delta_[0], T(1));
      }
      if (l == depth) continue;
      const size_t size = elements(layer.out());
      check(state.d, size, stage, l);
      if (tensors(l).belief != nullptr) {
        beliefs(l, scratch_);
        put(scratch_, layer.out().size(), given_rows(tensors(l).belief, l));
      }
      if (shared_.read[l].at != nullptr) {
        entering(l + 1, scratch_);
        leave_read(l + 1, scratch_);
      }
    }
  }

  // Backpropagation of the loss: exact, and fixed prediction in its closed form (docs/method.md fact 1).
  void pull_back_once() {
    const int depth = call_.depth;
    for (int l = depth; l >= 1; --l) {
      const Layer& layer = at(l);
      T *error = state_[l].error, *delta = delta_[0];
      if (l < depth) check(error, elements(layer.out()), kFirstIterationStage, l);
      clear(scratch_, elements(layer.inner()));
      deviate_tail(l, scratch_);
      pull_back_tail(l, error, delta);
      if (l > 1) {
        deviate_entry(l, nullptr);
        feed_back(l, delta, [&](const T* r, size_t first, size_t count) {
          __builtin_memcpy(state_[l - 1].error + first, r + first, count * sizeof(T));
        });
      }
      if (wants_update(l)) leave_for_update(l, delta, T(call_.factors[l - 1]));
    }
  }

  const Shared<T>& shared_;
  const Call& call_;
  State* state_;
  T *scratch_, *derivative_, *product_, *delta_[2], *output_, *target_, *target_sum_;
  T *s_ = nullptr, *sum_ = nullptr, *sum_before_ = nullptr, *sum_velocity_ = nullptr;  // Gram form
  T* delta_now_;
  int64_t first_, stage_;
  int samples_;
  bool last_, moves_;
  T eta_;
};

PCFAST_END
