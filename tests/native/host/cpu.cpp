// Calls of the CPU kernels, for sanitizers: networks of every kind of layer, in one and in three threads, which must give the
// same bits. Every array is a heap block of its own.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/program.h"

namespace pcfast::cpu::checked {
void run_float(const Call& call);
void run_double(const Call& call);
}  // namespace pcfast::cpu::checked

namespace {

using namespace pcfast;
using namespace pcfast::cpu;

std::mt19937 random_bits(7);

template <class T>
std::unique_ptr<T[]> drawn(size_t count, T scale) {
  std::unique_ptr<T[]> result(new T[count]);
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < count; ++i) result[i] = T(normal(random_bits)) * scale;
  return result;
}

constexpr cpu::Activation kNone{kIdentity, 0};
constexpr Pool kNotPooled{kNoPool, 1, 1, 1, 1, 0, 0, 0, true};

Pointwise only(Map map, int activation) { return {map, map, {activation, 0.1}, kNotPooled, kNone}; }

// By windows of 2x2, or of 3x3 that overlap and are padded.
Pointwise pooled(Map from, int before, int pool, int after, bool overlaps) {
  if (pool == kNoPool) return only(from, before);
  const Pool windows = overlaps ? Pool{pool, 3, 3, 2, 2, 1, 1, 0, false} : Pool{pool, 2, 2, 2, 2, 0, 0, 0, true};
  const auto count = [&](int n) { return (n + 2 * windows.padding_y - windows.window_y) / windows.stride_y + 1; };
  const Map to{from.channels, count(from.height), count(from.width)};
  return {from, to, {before, 0.1}, windows, {after, 0.1}};
}

Layer linear(int in, int out, int activation, int entry = kIdentity) {
  return {kLinear, only({in, 1, 1}, entry), 1, 1, 1, 1, 0, 0, only({out, 1, 1}, activation), false, 1};
}

Layer residual(int size, int entry) {
  Layer layer = linear(size, size, kIdentity, entry);
  layer.skip = true, layer.scale = 0.5;
  return layer;
}

Layer nothing(int size, int activation) {
  Layer layer = linear(size, size, activation);
  layer.kind = kNothing;
  return layer;
}

Layer behind(const Pointwise& entry, int out, int kernel, int stride, int padding) {
  const auto size = [&](int n) { return (n + 2 * padding - kernel) / stride + 1; };
  const Map inner{out, size(entry.to.height), size(entry.to.width)};
  return {kConvolution, entry, kernel, kernel, stride, stride, padding, padding, only(inner, kIdentity), false, 1};
}

Layer convolution(Map below, int out, int kernel, int stride, int padding, int pool, int before, int after,
                  bool overlaps = false) {
  Layer layer = behind(only(below, kIdentity), out, kernel, stride, padding);
  layer.tail = pooled(layer.inner(), before, pool, after, overlaps);
  return layer;
}

// Fortran's xGEMM, plainly.
template <class T>
void gemm(const char* transpose_a, const char* transpose_b, const int64_t* m, const int64_t* n, const int64_t* k,
          const T* alpha, const T* a, const int64_t* lda, const T* b, const int64_t* ldb, const T* beta, T* c,
          const int64_t* ldc) {
  for (int64_t j = 0; j < *n; ++j)
    for (int64_t i = 0; i < *m; ++i) {
      T sum = 0;
      for (int64_t l = 0; l < *k; ++l)
        sum += (*transpose_a == 'T' ? a[i * *lda + l] : a[l * *lda + i]) * (*transpose_b == 'T' ? b[l * *ldb + j] : b[j * *ldb + l]);
      T& to = c[j * *ldc + i];
      to = *alpha * sum + (*beta == 0 ? T(0) : *beta * to);
    }
}

struct Case {
  const char* name;
  std::vector<Layer> layers;
  bool relaxes, gram, starts;
  int loss;
  double momentum;
  bool in_rows = false;
};

template <class T>
bool same_on_all_threads(const Case& one, void (*run)(const Call&)) {
  const int64_t batch = 41, iterations = 5;
  const size_t depth = one.layers.size(), classes = one.layers.back().out().size();
  auto x = drawn<T>(batch * one.layers[0].entry.from.size(), 1);
  auto target = drawn<T>(batch * classes, 1);
  auto class_weight = std::unique_ptr<T[]>(new T[classes]);
  for (size_t c = 0; c < classes; ++c) class_weight[c] = T(c + 1);
  std::unique_ptr<int64_t[]> labels(new int64_t[batch]);
  for (int64_t n = 0; n < batch; ++n) labels[n] = n % 5 == 4 ? -7 : n % classes;
  const double step_sizes[iterations] = {0.3, 0.2, 0.1, 0.1, 0.1}, factors[16] = {1, 1, 1, 1, 1, 1, 1, 1};
  std::vector<std::unique_ptr<T[]>> held;
  std::vector<std::vector<std::unique_ptr<T[]>>> results;
  std::vector<std::vector<size_t>> sizes;
  std::vector<LayerTensors> given(depth);
  for (size_t l = 0; l < depth; ++l) {
    const Layer& layer = one.layers[l];
    const size_t terms = layer.kind == kLinear ? layer.below().size() : layer.below().channels * layer.taps();
    if (layer.kind != kNothing) {
      held.push_back(drawn<T>(terms * layer.inner().channels, T(0.5)));
      given[l].weight = held.back().get();
      held.push_back(drawn<T>(layer.inner().channels, 1));
      given[l].bias = held.back().get();
    }
    if (one.starts && l + 1 < depth) {
      held.push_back(drawn<T>(batch * layer.out().size(), 1));
      given[l].start = held.back().get();
    }
  }
  for (int threads : {1, 3}) {
    std::vector<std::unique_ptr<T[]>> out;
    std::vector<size_t> counts;
    const auto array = [&](size_t count) {
      out.emplace_back(new T[count]());
      counts.push_back(count);
      return out.back().get();
    };
    std::vector<LayerTensors> tensors = given;
    for (size_t l = 0; l < depth; ++l) {
      const Layer& layer = one.layers[l];
      tensors[l].vhat = array(batch * layer.out().size());
      if (one.relaxes) tensors[l].error = array(batch * layer.out().size());
      if (one.relaxes && l + 1 < depth) tensors[l].belief = array(batch * layer.out().size());
      if (layer.kind == kNothing) continue;
      const size_t terms = layer.kind == kLinear ? layer.below().size() : layer.below().channels * layer.taps();
      tensors[l].weight_gradient = array(terms * layer.inner().channels);
      tensors[l].bias_gradient = array(layer.inner().channels);
    }
    int64_t first_bad = kAllFinite;
    bool invalid_label = false;
    Call call{};
    call.layers = one.layers.data(), call.depth = static_cast<int>(depth), call.threads = threads;
    call.batch = batch, call.iterations = one.relaxes ? iterations : 0;
    call.relaxes = one.relaxes, call.fresh = !one.starts, call.gram = one.gram, call.updates = true;
    call.step_sizes = step_sizes, call.factors = factors, call.momentum = one.momentum;
    call.loss = one.loss, call.mean = true, call.ignored_label = -7, call.smoothing = 0.1, call.share = 1, call.loss_scale = 0.1;
    if (one.loss == kMse)
      call.target = target.get();
    else
      call.labels = labels.get(), call.class_weight = class_weight.get();
    call.x = x.get(), call.tensors = tensors.data(), call.loss_value = array(1), call.output_gradient = array(batch * classes);
    if (one.in_rows) call.gemm = reinterpret_cast<const void*>(&gemm<T>);
    call.first_bad = &first_bad, call.invalid_label = &invalid_label;
    run(call);
    if (first_bad != kAllFinite || invalid_label) return false;
    results.push_back(std::move(out));
    sizes.push_back(counts);
  }
  for (size_t i = 0; i < results[0].size(); ++i)
    if (std::memcmp(results[0][i].get(), results[1][i].get(), sizes[0][i] * sizeof(T)) != 0) return false;
  return true;
}

}  // namespace

int main() {
  const Layer first = convolution({2, 7, 8}, 7, 3, 1, 0, kNoPool, kTanh, kIdentity);
  const Layer second = convolution(first.out(), 3, 2, 1, 0, kMaxPool, kGelu, kRelu);
  const Layer overlapping = convolution(first.out(), 3, 2, 1, 0, kMaxPool, kGelu, kRelu, true);
  const Layer averaged = convolution(overlapping.out(), 3, 1, 1, 1, kAvgPool, kTanh, kIdentity, true);
  const Layer entered = behind(pooled(first.out(), kTanh, kMaxPool, kSilu, true), 3, 2, 1, 0);
  const Layer strided = convolution(first.out(), 5, 3, 2, 1, kAvgPool, kSilu, kSigmoid);
  const auto head = [](const Layer& below) { return linear(below.out().size(), 5, kLeakyRelu); };
  const Case cases[] = {
      {"mlp", {linear(9, 37, kTanh), linear(37, 13, kRelu), linear(13, 7, kGeluTanh), linear(7, 4, kIdentity)},
       true, false, false, kCrossEntropy, 0.5},
      {"gram mlp", {linear(200, 61, kTanh), linear(61, 6, kSigmoid), linear(6, 4, kIdentity)}, true, true, false, kMse, 0},
      {"gram mlp, momentum", {linear(9, 61, kTanh), linear(61, 6, kSilu), linear(6, 4, kTanh)}, true, true, false, kMse, 0.7},
      {"bare", {linear(9, 12, kIdentity), nothing(12, kGelu), linear(12, 4, kIdentity)}, true, false, true, kCrossEntropy, 0},
      {"gram convolution", {first, second, head(second), linear(5, 4, kIdentity)}, true, true, false, kCrossEntropy, 0},
      {"strided convolution", {first, strided, head(strided), linear(5, 4, kIdentity)}, true, false, true, kMse, 0.5},
      {"activations first, residual", {linear(9, 13, kIdentity, kTanh), residual(13, kSilu), linear(13, 5, kRelu, kGelu),
       linear(5, 4, kIdentity, kSigmoid)}, true, false, false, kCrossEntropy, 0.5},
      {"windows that overlap", {first, overlapping, averaged, head(averaged), linear(5, 4, kIdentity)},
       true, false, false, kMse, 0},
      {"pools before products", {first, entered, head(entered), linear(5, 4, kIdentity)}, true, false, true, kMse, 0.5},
      {"one backward pass, activations first", {linear(9, 13, kIdentity, kTanh), residual(13, kSilu),
       linear(13, 4, kIdentity, kSigmoid)}, false, false, false, kCrossEntropy, 0},
      {"one backward pass in rows", {linear(9, 37, kTanh), linear(37, 13, kRelu), linear(13, 7, kSilu), linear(7, 4, kIdentity)},
       false, false, false, kCrossEntropy, 0, true},
      {"one backward pass", {first, strided, head(strided), linear(5, 4, kIdentity)}, false, false, false, kCrossEntropy, 0},
  };
  int failures = 0;
  for (const Case& one : cases)
    if (!same_on_all_threads<float>(one, checked::run_float) || !same_on_all_threads<double>(one, checked::run_double)) {
      std::printf("%s: not finite, or other bits on three threads\n", one.name);
      ++failures;
    }
  return failures;
}
