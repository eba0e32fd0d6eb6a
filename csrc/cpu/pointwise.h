// The pointwise operations before or behind a product, over a lane group: values, and in deviation form differences and
// what pulls errors back.
#pragma once

#include "activations.h"
#include "arena.h"
#include "pooling.h"

PCFAST_BEGIN

// Their memory. `base` is what they read at the start, with what the activation saves of it behind it, `derivative` of the
// activation before the pool at the last deviation.
template <class T, int kVectors>
struct PointwiseState {
  T *base, *derivative, *relative, *pooled, *after_derivative;
  Integers<T>* winners;

  static size_t elements(const Map& map) { return size_t(map.size()) * kVectors * kLanes<T>; }

  void take(const Pointwise& op, Arena& arena) {
    const size_t to = elements(op.to);
    base = arena.take<T>(elements(op.from) * (1 + saved_planes(op.before.kind)));
    if (!op.pools()) return;
    if (op.pool.kind == kMaxPool) {
      relative = arena.take<T>(to * op.pool.window());
      winners = arena.take<Integers<T>>(to / kLanes<T>);
    }
    pooled = arena.take<T>(to * (1 + saved_planes(op.after.kind)));
    after_derivative = arena.take<T>(to);
  }

  // out = f(base); what deviations need is saved. `scratch` is as large as `from`.
  void begin(const Pointwise& op, T* out, T* scratch) {
    const size_t from = elements(op.from), to = elements(op.to);
    if (!op.pools()) return activate<T>(op.before, base, from, out, base + from, from);
    activate<T>(op.before, base, from, scratch, base + from, from);
    pool<T, kVectors>(op, scratch, nullptr, pooled, winners);
    if (op.pool.kind == kMaxPool) relative_to_winner<T, kVectors>(op, scratch, pooled, relative);
    activate<T>(op.after, pooled, to, out, pooled + to, to);
  }

  // The same once more: what was saved stays.
  void again(const Pointwise& op, T* out) const {
    if (op.pools())
      activate<T>(op.after, pooled, elements(op.to), out, nullptr, 0);
    else
      activate<T>(op.before, base, elements(op.from), out, nullptr, 0);
  }

  // moved = f(base + s) - f(base), and the derivatives there. moved, which may be s, is as large as both maps, `scratch` as
  // `to`.
  void deviate(const Pointwise& op, const T* s, T* moved, T* scratch) {
    const size_t from = elements(op.from), to = elements(op.to);
    act_diffs<T>(op.before, base, from, s, from, moved, derivative);
    if (!op.pools()) return;
    pool<T, kVectors>(op, moved, relative, scratch, winners);
    act_diffs<T>(op.after, pooled, to, scratch, to, moved, after_derivative);
  }

  // below = the error pulled back, at the point of the last deviation. `scratch`, of a pool, is as large as `to`, and may be
  // the error.
  void pull_back(const Pointwise& op, const T* error, T* below, T* scratch) const {
    const size_t from = elements(op.from), to = elements(op.to);
    if (!op.pools()) {
      for (size_t i = 0; i < from; i += kLanes<T>) store(below + i, load(error + i) * load(derivative + i));
      return;
    }
    for (size_t i = 0; i < to; i += kLanes<T>) store(scratch + i, load(error + i) * load(after_derivative + i));
    pull_back_pool<T, kVectors>(op, scratch, winners, below);
    if (op.before.kind != kIdentity)
      for (size_t i = 0; i < from; i += kLanes<T>) store(below + i, load(below + i) * load(derivative + i));
  }

  // values = f(values), anywhere. It ends what pull_back goes by. `scratch` is as large as `to`.
  void apply(const Pointwise& op, T* values, T* scratch) {
    const size_t from = elements(op.from), to = elements(op.to);
    activate<T>(op.before, values, from, values, nullptr, 0);
    if (!op.pools()) return;
    pool<T, kVectors>(op, values, nullptr, scratch, winners);
    activate<T>(op.after, scratch, to, values, nullptr, 0);
  }
};

PCFAST_END
