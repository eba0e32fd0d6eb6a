// Activation functions, their differences and derivatives at one element, free of cancellation: the deviation form
// (docs/method.md fact 8).
//
// For a pre-activation u = uhat + s:  act_diff = act(uhat + s) - act(uhat),  derivative = act'(uhat + s). No difference is
// taken of two nearly equal numbers. NaN in uhat or s gives NaN.
#pragma once

#include "../codes.h"
#include "../tile/platform.cuh"

namespace pcfast::resident {

template <class Real>
struct ActDiff {
  Real act_diff, derivative;
};

namespace detail {

template <class Real>
__device__ Real relu_diff(Real uhat, Real s) {
  // max(s, -uhat) where uhat > 0, max(uhat + s, 0) elsewhere; comparisons are written so that NaN passes
  Real floor = uhat > 0 ? -uhat : Real(0);
  Real moved = uhat > 0 ? s : s + uhat;
  return moved <= floor ? floor : moved;
}

template <class Real>
__device__ Real gate(Real w, Real closed) {
  return w > 0 ? Real(1) : w <= 0 ? closed : w;
}

template <class Real>
struct Sigmoids {
  Real p, q;  // of x and -x, both with full relative accuracy
};

template <class Real>
__device__ Sigmoids<Real> sigmoids(Real x) {
  Real e = exp(-fabs(x));
  Real large = Real(1) / (Real(1) + e), small = e * large;
  return x > 0 ? Sigmoids<Real>{large, small} : Sigmoids<Real>{small, large};
}

template <class Real>
struct SigmoidDifference {
  Real difference, p, q;  // sigmoid(x + dx) - sigmoid(x), and both sides at x + dx
};

template <class Real>
__device__ SigmoidDifference<Real> sigmoid_difference(Real x, Real dx) {
  // p' - p = tanh(dx / 2) (p q' + q p'), a sum of positive terms
  Sigmoids<Real> at = sigmoids(x), moved = sigmoids(x + dx);
  return {tanh(Real(0.5) * dx) * (at.p * moved.q + at.q * moved.p), moved.p, moved.q};
}

template <class Real>
__device__ Real normal_density(Real u) {
  return exp(Real(-0.5) * u * u) * Real(0.3989422804014326779);
}

// Gauss-Legendre with 3 points on the density has a relative error of 5e-7 s^6 He_6(u); beyond this |s| the difference of
// the distribution function, taken in the tail where it is small, loses at most log2(1 / reach) + 1 bits.
template <class Real>
constexpr Real kQuadratureReach = sizeof(Real) == 4 ? Real(0.2) : Real(0.005);

template <class Real>
struct NormalDifference {
  Real difference, moved;  // Phi(u + s) - Phi(u), Phi(u + s)
};

template <class Real>
__device__ NormalDifference<Real> normal_difference(Real u, Real s) {
  Real w = u + s;
  bool upper = u + w > 0;
  Real tail = upper ? Real(0.7071067811865475244) : Real(-0.7071067811865475244);
  Real tail_w = Real(0.5) * erfc(tail * w), tail_u = Real(0.5) * erfc(tail * u);
  Real difference = upper ? tail_u - tail_w : tail_w - tail_u;
  if (fabs(s) < kQuadratureReach<Real>) {
    Real middle = u + Real(0.5) * s, step = s * Real(0.3872983346207416885);
    Real sides = normal_density(middle - step) + normal_density(middle + step);
    difference = s * (normal_density(middle) * Real(4.0 / 9.0) + sides * Real(5.0 / 18.0));
  }
  return {difference, upper ? Real(1) - tail_w : tail_w};
}

// u (1 + tanh(k (u + c u^3))) / 2 with k = sqrt(2 / pi)
template <class Real>
constexpr Real kGeluK = Real(0.7978845608028653559);
template <class Real>
constexpr Real kGeluC = Real(0.044715);

template <class Real>
__device__ Real gelu_inner(Real u) {
  return u * kGeluK<Real> * (Real(1) + u * u * kGeluC<Real>);
}

}  // namespace detail

template <class Real>
__device__ Real activate(Real u, int code, double negative_slope) {
  switch (code) {
    case kRelu:
      return u <= 0 ? Real(0) : u;
    case kLeakyRelu:
      return u > 0 ? u : u * Real(negative_slope);
    case kTanh:
      return tanh(u);
    case kSigmoid:
      return detail::sigmoids(u).p;
    case kSilu:
      return u * detail::sigmoids(u).p;
    case kGelu:
      return u * (Real(0.5) * erfc(u * Real(-0.7071067811865475244)));
    case kGeluTanh:
      return u * detail::sigmoids(Real(2) * detail::gelu_inner(u)).p;
    default:
      return u;
  }
}

template <class Real>
__device__ ActDiff<Real> act_diff_and_derivative(Real uhat, Real s, int code, double negative_slope) {
  using namespace detail;
  Real w = uhat + s;
  switch (code) {
    case kRelu:
      return {relu_diff(uhat, s), gate(w, Real(0))};
    case kLeakyRelu: {
      const Real closed = Real(negative_slope);
      return {relu_diff(uhat, s) * (Real(1) - closed) + s * closed, gate(w, closed)};
    }
    case kTanh: {
      // tanh(u) = 2 sigmoid(2 u) - 1; 4 p q keeps its digits where 1 - tanh^2 has none left
      SigmoidDifference<Real> at_moved = sigmoid_difference(Real(2) * uhat, Real(2) * s);
      return {Real(2) * at_moved.difference, Real(4) * at_moved.p * at_moved.q};
    }
    case kSigmoid: {
      SigmoidDifference<Real> at_moved = sigmoid_difference(uhat, s);
      return {at_moved.difference, at_moved.p * at_moved.q};
    }
    case kSilu: {
      // (u + s) p' - u p = s p' + u (p' - p)
      SigmoidDifference<Real> at_moved = sigmoid_difference(uhat, s);
      return {s * at_moved.p + uhat * at_moved.difference, at_moved.p * (Real(1) + w * at_moved.q)};
    }
    case kGelu: {
      NormalDifference<Real> at_moved = normal_difference(uhat, s);
      return {s * at_moved.moved + uhat * at_moved.difference, at_moved.moved + w * normal_density(w)};
    }
    case kGeluTanh: {
      // (1 + tanh(x)) / 2 = sigmoid(2 x); the difference of the inner cubic is a polynomial in s
      Real step = s * kGeluK<Real> * (Real(1) + (Real(3) * uhat * w + s * s) * kGeluC<Real>);
      SigmoidDifference<Real> at_moved = sigmoid_difference(Real(2) * gelu_inner(uhat), Real(2) * step);
      Real inner_derivative = (Real(1) + Real(3) * w * w * kGeluC<Real>) * kGeluK<Real>;
      return {s * at_moved.p + uhat * at_moved.difference,
              at_moved.p + Real(2) * w * at_moved.p * at_moved.q * inner_derivative};
    }
    default:
      return {s, Real(1)};
  }
}

}  // namespace pcfast::resident
