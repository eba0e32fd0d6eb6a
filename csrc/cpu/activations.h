// Activations over rows of a lane group: values, and in deviation form differences and derivatives (docs/method.md fact 8).
//
// For a pre-activation u = uhat + s:  act_diff = act(uhat + s) - act(uhat),  derivative = act'(uhat + s). Where s is small,
// which it nearly always is, identities give the difference without cancellation from what the forward pass has saved;
// elsewhere the point is evaluated anew. Each lane is computed by its own s alone, whatever its neighbours take. NaN gives
// NaN. Of the two operands of every subtraction here at most one is a product, or both are far apart, so that a compiler
// may contract a product and a sum into one rounding.
#pragma once

#include "math.h"
#include "program.h"

PCFAST_BEGIN

// Planes that a forward pass saves beside uhat.
inline int saved_planes(int activation) {
  switch (activation) {
    case kTanh:  // tanh(uhat)
    case kGelu:  // Phi(uhat)
      return 1;
    case kSigmoid:  // sigmoid(uhat), sigmoid(-uhat)
    case kSilu:
    case kGeluTanh:  // the same of twice the inner cubic
      return 2;
    default:
      return 0;
  }
}

template <class T>
PCFAST_INLINE Vector<T> gelu_inner(Vector<T> u) {
  return (u * u * T(0.044715) + T(1)) * u * T(0.7978845608028653559);
}

template <class T>
PCFAST_INLINE Vector<T> normal_distribution(Vector<T> u) {
  return erfc<T>(u * T(-0.7071067811865475244)) * T(0.5);
}

// act(u), element by element; with `saved` what differences at u need, a plane each.
template <class T>
void activate(const Activation& act, const T* u, size_t count, T* out, T* saved, size_t plane) {
  const T slope = T(act.negative_slope);
  for (size_t i = 0; i < count; i += kLanes<T>) {
    Vector<T> at = load(u + i), value = at, first = {}, second = {};
    switch (act.kind) {
      case kRelu:
        value = at <= 0 ? Vector<T>{} : at;
        break;
      case kLeakyRelu:
        value = at > 0 ? at : at * slope;
        break;
      case kTanh:
        value = first = tanh<T>(at);
        break;
      case kSigmoid: {
        Sigmoids<T> both = sigmoids<T>(at);
        value = first = both.p, second = both.q;
        break;
      }
      case kSilu: {
        Sigmoids<T> both = sigmoids<T>(at);
        first = both.p, second = both.q;
        value = at * first;
        break;
      }
      case kGelu:
        first = normal_distribution<T>(at);
        value = at * first;
        break;
      case kGeluTanh: {
        Sigmoids<T> both = sigmoids<T>(gelu_inner<T>(at) * T(2));
        first = both.p, second = both.q;
        value = at * first;
        break;
      }
      default:
        break;
    }
    store(out + i, value);
    if (saved == nullptr) continue;
    const int planes = saved_planes(act.kind);
    if (planes > 0) store(saved + i, first);
    if (planes > 1) store(saved + plane + i, second);
  }
}

template <class T>
struct ActDiff {
  Vector<T> act_diff, derivative;
};

template <class T>
struct SigmoidDifference {
  Vector<T> difference, p, q;  // sigmoid(x + dx) - sigmoid(x), and both sides at x + dx
};

// From p = sigmoid(x), q = sigmoid(-x) for |dx| <= kSmall: with m = exp(dx) - 1, p' = p (1 + m) / (q + p (1 + m)), and
// the difference is p q m / (q + p (1 + m)); sums of positive terms.
template <class T>
PCFAST_INLINE SigmoidDifference<T> sigmoid_difference_near(Vector<T> p, Vector<T> q, Vector<T> dx) {
  Vector<T> m = expm1_small<T>(dx);
  Vector<T> grown = p * (m + T(1)), inverse = T(1) / (q + grown);
  return {p * q * m * inverse, grown * inverse, q * inverse};
}

template <class T>
PCFAST_INLINE SigmoidDifference<T> sigmoid_difference_far(Vector<T> p, Vector<T> q, Vector<T> x, Vector<T> dx) {
  // tanh(dx / 2) (p q' + q p'), a sum of positive terms
  Sigmoids<T> moved = sigmoids<T>(x + dx);
  return {tanh<T>(dx * T(0.5)) * (p * moved.q + q * moved.p), moved.p, moved.q};
}

template <class T, bool kFar>
PCFAST_INLINE SigmoidDifference<T> sigmoid_difference(Vector<T> p, Vector<T> q, Vector<T> x, Vector<T> dx) {
  SigmoidDifference<T> near = sigmoid_difference_near<T>(p, q, dx);
  if constexpr (!kFar) return near;
  SigmoidDifference<T> far = sigmoid_difference_far<T>(p, q, x, dx);
  auto is_near = magnitude<T>(dx) <= kSmall<T>;
  return {is_near ? near.difference : far.difference, is_near ? near.p : far.p, is_near ? near.q : far.q};
}

// Within it Gauss-Legendre with 3 points on the density has a relative error of 5e-7 s^6 He_6(u), and beyond it the
// difference of the distribution function, taken in the tail where it is small, loses at most log2(1 / reach) + 1 bits.
template <class T>
constexpr T kQuadratureReach = sizeof(T) == 4 ? T(0.2) : T(0.005);

template <class T, bool kFar>
PCFAST_INLINE ActDiff<T> gelu_diff(Vector<T> u, Vector<T> s, Vector<T> phi) {
  Vector<T> w = u + s;
  Vector<T> middle = u + s * T(0.5), step = s * T(0.3872983346207416885);
  Vector<T> sides = normal_density<T>(middle - step) + normal_density<T>(middle + step);
  Vector<T> difference = s * (normal_density<T>(middle) * T(4.0 / 9.0) + sides * T(5.0 / 18.0));
  Vector<T> moved = phi + difference;
  if constexpr (kFar) {
    auto upper = u + w > 0;
    Vector<T> tail = upper ? broadcast<T>(T(0.7071067811865475244)) : broadcast<T>(T(-0.7071067811865475244));
    Vector<T> tail_w = erfc<T>(tail * w) * T(0.5), tail_u = erfc<T>(tail * u) * T(0.5);
    auto is_near = magnitude<T>(s) < kQuadratureReach<T>;
    difference = is_near ? difference : upper ? tail_u - tail_w : tail_w - tail_u;
    moved = is_near ? moved : upper ? T(1) - tail_w : tail_w;
  }
  return {s * moved + u * difference, moved + w * normal_density<T>(w)};
}

template <class T>
PCFAST_INLINE Vector<T> relu_diff(Vector<T> u, Vector<T> s) {
  // max(s, -uhat) where uhat > 0, max(uhat + s, 0) elsewhere
  auto open = u > 0;
  Vector<T> floor = open ? -u : Vector<T>{}, moved = open ? s : s + u;
  return moved <= floor ? floor : moved;
}

template <class T, int kActivation, bool kFar>
PCFAST_INLINE ActDiff<T> act_diff_at(T slope, const T* saved, size_t plane, Vector<T> u, Vector<T> s) {
  Vector<T> w = u + s;
  if constexpr (kActivation == kRelu) {
    return {relu_diff<T>(u, s), w > 0 ? broadcast<T>(T(1)) : w <= 0 ? Vector<T>{} : w};
  } else if constexpr (kActivation == kLeakyRelu) {
    return {relu_diff<T>(u, s) * (T(1) - slope) + s * slope,
            w > 0 ? broadcast<T>(T(1)) : w <= 0 ? broadcast<T>(slope) : w};
  } else if constexpr (kActivation == kTanh) {
    // with a = tanh(uhat), t = tanh(s): (a + t) / (1 + a t) - a = t (1 - a^2) / (1 + a t)
    Vector<T> a = load(saved), t = tanh_small<T>(s);
    Vector<T> act_diff = t * (T(1) - a * a) / (a * t + T(1));
    Vector<T> moved = a + act_diff;
    if constexpr (kFar) {
      // tanh(p) - tanh(q) = tanh(p - q) (1 - tanh(p) tanh(q))
      Vector<T> there = tanh<T>(w), far = tanh<T>(s) * (T(1) - a * there);
      auto is_near = magnitude<T>(s) <= kTanhSmall<T>;
      act_diff = is_near ? act_diff : far;
      moved = is_near ? moved : there;
    }
    return {act_diff, T(1) - moved * moved};
  } else if constexpr (kActivation == kSigmoid) {
    SigmoidDifference<T> at = sigmoid_difference<T, kFar>(load(saved), load(saved + plane), u, s);
    return {at.difference, at.p * at.q};
  } else if constexpr (kActivation == kSilu) {
    // (u + s) p' - u p = s p' + u (p' - p)
    SigmoidDifference<T> at = sigmoid_difference<T, kFar>(load(saved), load(saved + plane), u, s);
    return {s * at.p + u * at.difference, at.p * (w * at.q + T(1))};
  } else if constexpr (kActivation == kGelu) {
    return gelu_diff<T, kFar>(u, s, load(saved));
  } else if constexpr (kActivation == kGeluTanh) {
    // (1 + tanh(x)) / 2 = sigmoid(2 x); the difference of the inner cubic is a polynomial in s
    constexpr T k = T(0.7978845608028653559), c = T(0.044715);
    Vector<T> step = s * T(2 * k) * ((u * w * T(3) + s * s) * c + T(1));
    Vector<T> inner = gelu_inner<T>(u) * T(2);
    SigmoidDifference<T> at = sigmoid_difference<T, kFar>(load(saved), load(saved + plane), inner, step);
    Vector<T> inner_derivative = (w * w * T(3 * c) + T(1)) * k;
    return {s * at.p + u * at.difference, at.p + w * at.p * at.q * inner_derivative * T(2)};
  } else {
    return {s, broadcast<T>(T(1))};
  }
}

template <class T, int kActivation, bool kFar, class Use>
void act_diff_loop(T slope, const T* u, size_t plane, const T* s, size_t count, Use use) {
  for (size_t i = 0; i < count; i += kLanes<T>)
    use(i, act_diff_at<T, kActivation, kFar>(slope, u + plane + i, plane, load(u + i), load(s + i)));
}

template <class T, int kActivation, class Use>
void act_diff_by_size(T reach, T slope, const T* u, size_t plane, const T* s, size_t count, Use use) {
  Vector<T> largest = {};
  for (size_t i = 0; i < count; i += kLanes<T>) {
    Vector<T> size = magnitude<T>(load(s + i));
    largest = size > largest ? size : largest;
  }
  if (largest_lane<T>(largest) < reach)
    act_diff_loop<T, kActivation, false>(slope, u, plane, s, count, use);
  else
    act_diff_loop<T, kActivation, true>(slope, u, plane, s, count, use);
}

// use(i, ActDiff) for every vector of `count` elements, of which i is the first. u: uhat, then the saved planes, each
// `plane` elements after the one before.
template <class T, class Use>
void for_each_act_diff(const Activation& act, const T* u, size_t plane, const T* s, size_t count, Use use) {
  const T slope = T(act.negative_slope);
  switch (act.kind) {
    case kRelu:
      return act_diff_loop<T, kRelu, false>(slope, u, plane, s, count, use);
    case kLeakyRelu:
      return act_diff_loop<T, kLeakyRelu, false>(slope, u, plane, s, count, use);
    case kTanh:
      return act_diff_by_size<T, kTanh>(kTanhSmall<T>, slope, u, plane, s, count, use);
    case kSigmoid:
      return act_diff_by_size<T, kSigmoid>(kSmall<T>, slope, u, plane, s, count, use);
    case kSilu:
      return act_diff_by_size<T, kSilu>(kSmall<T>, slope, u, plane, s, count, use);
    case kGelu:
      return act_diff_by_size<T, kGelu>(kQuadratureReach<T>, slope, u, plane, s, count, use);
    case kGeluTanh:  // its sigmoid moves by up to twice k (1 + 3 c w^2) s: by s alone nothing is near
      return act_diff_loop<T, kGeluTanh, true>(slope, u, plane, s, count, use);
    default:
      return act_diff_loop<T, kIdentity, false>(slope, u, 0, s, count, use);
  }
}

// Differences, which may take the place of s, and derivatives.
template <class T>
void act_diffs(const Activation& act, const T* u, size_t plane, const T* s, size_t count, T* act_diff, T* derivative) {
  for_each_act_diff<T>(act, u, plane, s, count, [&](size_t i, const ActDiff<T>& at) {
    store(act_diff + i, at.act_diff);
    store(derivative + i, at.derivative);
  });
}

PCFAST_END
