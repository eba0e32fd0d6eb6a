// One call, for the instruction set that this file is compiled for (PCFAST_ISA): weights are packed, every lane group is
// relaxed on whatever thread comes first, then the weight gradients are computed, block by block.
//
// Nothing of the C++ library is used here: the linker would take one object file's copy of it, with its instructions, for
// all of them.
#include "group.h"
#include "row_pass.h"
#include "subnormals.h"

PCFAST_BEGIN

namespace {

// Calls body(index, thread) for every index, each on the thread that is free first.
template <class T, class Body>
void for_each(int threads, int64_t count, Body body) {
  struct Context {
    Body& body;
    int64_t count, next;
    int thread;
  } context{body, count, 0, 0};
  parallel(
      count < threads ? static_cast<int>(count) : threads,
      [](void* pointer) {
        Context& shared = *static_cast<Context*>(pointer);
        const int thread = __atomic_fetch_add(&shared.thread, 1, __ATOMIC_RELAXED);
        const SubnormalsAreZero zero(sizeof(T) == sizeof(float));
        for (int64_t i; (i = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED)) < shared.count;)
          shared.body(i, thread);
      },
      &context);
}

constexpr size_t kLine = 64;

// Rows of whole cache lines, an odd number of them, so that a column does not fall into few of the cache's sets.
template <class T>
size_t odd_step(int features) {
  const size_t lines = (features * sizeof(T) + kLine - 1) / kLine;
  return (lines | 1) * (kLine / sizeof(T));
}

// Multiply-adds that are worth another thread.
constexpr double kWorkOfAThread = 3e5;

inline int useful_threads(const Call& call) {
  double macs = 0;
  for (int l = 0; l < call.depth; ++l) {
    const Layer& layer = call.layers[l];
    const double terms = layer.kind == kLinear ? layer.below().size() : double(layer.below().channels) * layer.taps();
    macs += layer.kind == kNothing ? layer.below().size() : terms * layer.inner().size();
  }
  const double work = macs * call.batch * (3 + (call.relaxes ? 2.0 * call.iterations : 0.0));
  const double most = 1 + work / kWorkOfAThread;
  return most < call.threads ? static_cast<int>(most) : call.threads;
}

template <class T>
size_t weight_count(const Layer& layer) {
  if (layer.kind == kNothing) return 0;
  return size_t(layer.inner().channels) * (layer.kind == kLinear ? layer.below().size() : layer.below().channels * layer.taps());
}

// What a target of labels counts: of a mean its share over the weights of all rows.
template <class T>
double label_scale_of(const Call& call) {
  double weight = 0;
  if (call.labels != nullptr)
    for (int64_t n = 0; n < call.batch; ++n) {
      const Label<T> label = label_at<T>(call, n);
      weight += label.weight;
      if (label.invalid) *call.invalid_label = true;
    }
  // where all labels are ignored the weights sum to zero, and so is the gradient
  return !call.mean ? 1 : weight > 0 ? call.share / weight : 0;
}

template <class T>
void write_loss(const Call& call, const double* rows) {
  double loss = 0;
  for (int64_t n = 0; n < call.batch; ++n) loss += rows[n];
  *static_cast<T*>(call.loss_value) = T(loss);
}

template <class T>
class Run {
 public:
  explicit Run(const Call& call) : call_(call), threads_(useful_threads(call)) {
    const int depth = call.depth;
    wide_ = kMaxVectors * kLanes<T>;
    // Narrow groups take a little more than half the time of wide ones: where they keep more threads busy
    const auto rounds = [&](int width) { return ((call.batch + width - 1) / width + threads_ - 1) / threads_; };
    if (call.batch <= kLanes<T> || 1.1 * rounds(kLanes<T>) < 2.0 * rounds(wide_)) wide_ = kLanes<T>;
    groups_ = (call.batch + wide_ - 1) / wide_;

    Arena counted{nullptr};
    lay_out(counted);
    memory_ = static_cast<char*>(take_workspace(counted.used));
    Arena arena{memory_};
    lay_out(arena);
    for_each<T>(threads_, depth, [&](int64_t l, int) { pack_layer(static_cast<int>(l) + 1); });
  }
  ~Run() { give_back_workspace(memory_); }

  void operator()() {
    const double label_scale = label_scale_of<T>(call_);
    if (call_.gram) make_gram();
    const Shared<T> shared{call_, packed_, gram_packed_, local_error_, own_, convolution_gradient_, loss_rows_, label_scale};

    for_each<T>(threads_, groups_, [&](int64_t index, int thread) {
      const int64_t first = index * wide_;
      Arena arena{thread_memory_ + thread * thread_bytes_};
      if (wide_ == kLanes<T> || call_.batch - first <= kLanes<T>)
        Group<T, 1>(shared, arena).run(first);
      else
        Group<T, kMaxVectors>(shared, arena).run(first);
    });
    write_loss<T>(call_, loss_rows_);
    if (call_.updates) weight_gradients();
  }

 private:
  const Layer& at(int l) const { return call_.layers[l - 1]; }
  const LayerTensors& tensors(int l) const { return call_.tensors[l - 1]; }

  void lay_out(Arena& arena) {
    const int depth = call_.depth;
    packed_ = arena.take<Packed<T>>(depth);
    local_error_ = arena.take<T*>(depth);
    own_ = arena.take<Rows<T>>(depth);
    read_ = arena.take<Rows<const T>>(depth);
    convolution_gradient_ = arena.take<T*>(depth);
    tasks_ = arena.take<int64_t>(depth + 1);
    loss_rows_ = arena.take<double>(call_.batch);
    for (int l = 1; l <= depth; ++l) {
      const size_t count = weight_count<T>(at(l));
      const bool feeds_back = count > 0 && l > 1;
      const Packed<T> packed{arena.take<T>(count), arena.take<T>(feeds_back ? count : 0)};
      const bool convolution = at(l).kind == kConvolution, update = call_.updates && tensors(l).trained();
      T* error = update && !convolution ? arena.take<T>(call_.batch * at(l).inner().size()) : nullptr;
      T* partial = update && convolution ? arena.take<T>(vectors() * gradient_count(at(l))) : nullptr;
      // what its update reads: beliefs that the caller gets, or x, or an array of our own
      const void* given = l > 1 ? tensors(l - 1).belief : call_.x;
      const bool there = given != nullptr && !at(l).entry.acts();
      const size_t features = at(l).below().size(), step = odd_step<T>(features);
      const Rows<T> own{update && !convolution && !there ? arena.take<T>(call_.batch * step) : nullptr, step};
      if (arena.at == nullptr) continue;
      packed_[l - 1] = packed;
      if (!feeds_back) packed_[l - 1].feedback = nullptr;
      local_error_[l - 1] = error;
      own_[l - 1] = own;
      read_[l - 1] = there ? Rows<const T>{static_cast<const T*>(given), features} : Rows<const T>{own.at, step};
      convolution_gradient_[l - 1] = partial;
    }
    if (call_.gram) {
      const Layer& layer = at(2);
      const int taps = layer.kind == kLinear ? 1 : (2 * layer.kernel_y - 1) * (2 * layer.kernel_x - 1);
      const size_t count = size_t(layer.inner().channels) * layer.inner().channels * taps;
      gram_ = arena.take<T>(count);
      gram_packed_ = arena.take<T>(count);
    }
    Arena wide{nullptr}, narrow{nullptr};
    const Shared<T> shared{call_, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
    Group<T, kMaxVectors>(shared, wide);
    Group<T, 1>(shared, narrow);
    thread_bytes_ = wide_ == kLanes<T> ? narrow.used : wide.used;
    thread_memory_ = arena.take<char>(thread_bytes_ * (groups_ < threads_ ? groups_ : threads_));
    panels_ = arena.take<T>(kPanel * threads_);
  }

  static constexpr size_t kPanel = size_t(kTermsAtOnce) * kMaxVectors * kLanes<T>;
  T* panel_of(int thread) const { return panels_ + thread * kPanel; }

  void pack_layer(int l) {
    const Layer& layer = at(l);
    if (layer.kind == kNothing) return;
    const T* weights = static_cast<const T*>(tensors(l).weight);
    const bool linear = layer.kind == kLinear;
    const int taps = linear ? 1 : layer.taps(), channels = linear ? layer.below().size() : layer.below().channels;
    const size_t row = size_t(channels) * taps;
    const T scale = T(layer.scale);
    T *predict = const_cast<T*>(packed_[l - 1].predict), *feedback = const_cast<T*>(packed_[l - 1].feedback);
    if (linear) {
      pack_linear<T>(weights, scale, layer.inner().channels, row, channels, 1, predict);
      if (feedback != nullptr) pack_linear<T>(weights, scale, channels, 1, layer.inner().channels, row, feedback);
      return;
    }
    pack<T>(weights, scale, layer.inner().channels, row, channels, taps, taps, predict);
    if (feedback != nullptr) pack<T>(weights, scale, channels, taps, layer.inner().channels, row, taps, feedback);
  }

  // G = W_2 W_2^T, or the kernel of layer 2 correlated with itself, of scaled weights.
  void make_gram() {
    const Layer& layer = at(2);
    const T* weights = static_cast<const T*>(tensors(2).weight);
    const int size = layer.inner().channels;
    if (layer.kind == kLinear) {
      const int terms = layer.below().size();
      constexpr int kWidth = kMaxVectors * kLanes<T>;
      for_each<T>(threads_, (size + kWidth - 1) / kWidth, [&](int64_t index, int thread) {
        const int first = static_cast<int>(index) * kWidth, columns = size - first < kWidth ? size - first : kWidth;
        const auto transpose = [&](int64_t k, int count, T* panel) {
          gather<T, kWidth>({weights + size_t(first) * terms + k, size_t(terms)}, columns, count, panel);
        };
        const auto left_at = [&](int row, int, int64_t k, int now) {
          return packed_[1].predict + size_t(size) * k + size_t(row) * now;
        };
        outer_panel<T>(left_at, size, transpose, columns, terms, gram_ + first, size, panel_of(thread));
      });
      pack_linear<T>(gram_, T(layer.scale), size, size, size, 1, gram_packed_);  // the other scale is in packed weights
      return;
    }
    const int ky = layer.kernel_y, kx = layer.kernel_x, channels = layer.below().channels, wide = 2 * kx - 1;
    const int taps = (2 * ky - 1) * wide;
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < size; ++j)
        for (int tap = 0; tap < taps; ++tap) {
          const int dy = tap / wide - (ky - 1), dx = tap % wide - (kx - 1);
          T sum = 0;
          for (int c = 0; c < channels; ++c)
            for (int y = dy < 0 ? -dy : 0; y < ky && y + dy < ky; ++y)
              for (int x = dx < 0 ? -dx : 0; x < kx && x + dx < kx; ++x)
                sum += weights[((size_t(i) * channels + c) * ky + y + dy) * kx + x + dx] *
                       weights[((size_t(j) * channels + c) * ky + y) * kx + x];
          gram_[(size_t(i) * size + j) * taps + tap] = sum;
        }
    pack<T>(gram_, T(layer.scale * layer.scale), size, size_t(size) * taps, size, taps, taps, gram_packed_);
  }

  size_t vectors() const { return (call_.batch + kLanes<T> - 1) / kLanes<T>; }

  // A task is a panel of columns of one layer's weights, or a whole convolution; the sum over the batch has one order.
  void weight_gradients() {
    constexpr int kWidth = kMaxVectors * kLanes<T>;
    tasks_[0] = 0;
    for (int l = 1; l <= call_.depth; ++l)
      tasks_[l] = tasks_[l - 1] + (!tensors(l).trained()                ? 0
                                   : at(l).kind == kConvolution ? 1
                                                                : (at(l).below().size() + kWidth - 1) / kWidth);
    const int64_t stage = kFirstIterationStage + (call_.relaxes ? call_.iterations : 0);
    for_each<T>(threads_, tasks_[call_.depth], [&](int64_t task, int thread) {
      int l = 1;
      while (task >= tasks_[l]) ++l;
      if (at(l).kind == kConvolution) {
        if (!sum_convolution(l)) note_first_bad(call_, stage, l);
        return;
      }
      const int first = static_cast<int>(task - tasks_[l - 1]) * kWidth;
      const int size = at(l).below().size(), columns = size - first < kWidth ? size - first : kWidth;
      const T* error = local_error_[l - 1];
      const Rows<const T> below = read_[l - 1];
      bool fine = true;
      const auto copy = [&](int64_t k, int count, T* panel) {
        if (columns < kWidth) __builtin_memset(panel, 0, sizeof(T) * count * kWidth);
        for (int i = 0; i < count; ++i)
          __builtin_memcpy(panel + i * kWidth, below.at + (k + i) * below.step + first, columns * sizeof(T));
      };
      if (T* to = static_cast<T*>(tensors(l).weight_gradient); to != nullptr)
        fine = outer_panel<T>(
            [&](int row, int count, int64_t k, int) { return error + row * call_.batch + k * count; },
            at(l).inner().channels, copy, columns, call_.batch, to + first, size, panel_of(thread));
      if (first == 0 && tensors(l).bias_gradient != nullptr)
        fine = sum_rows(error, at(l).inner().channels, static_cast<T*>(tensors(l).bias_gradient)) && fine;
      if (!fine) note_first_bad(call_, stage, l);
    });
  }

  // The gradients that every vector of lanes has left, in their order.
  bool sum_convolution(int l) {
    const size_t count = gradient_count(at(l)), weights = weight_count<T>(at(l));
    T *sum = convolution_gradient_[l - 1], bad = 0;
    for (size_t v = 1; v < vectors(); ++v)
      for (size_t i = 0; i < count; ++i) sum[i] += sum[v * count + i];
    for (size_t i = 0; i < count; ++i) bad += sum[i] * T(0);
    if (tensors(l).weight_gradient != nullptr) __builtin_memcpy(tensors(l).weight_gradient, sum, weights * sizeof(T));
    if (tensors(l).bias_gradient != nullptr)
      __builtin_memcpy(tensors(l).bias_gradient, sum + weights, (count - weights) * sizeof(T));
    return bad == bad;
  }

  bool sum_rows(const T* packed, int features, T* out) {
    T bad = 0;
    const Blocks blocks(features);
    for (int block = 0; block < blocks.count; ++block) {
      const int first = blocks.begin(block), count = blocks.begin(block + 1) - first;
      const T* rows = packed + first * call_.batch;
      const Parts parts(call_.batch);
      T* sum = out + first;
      for (int64_t part = 0; part < parts.count; ++part) {
        T some[kMaxRows] = {};
        for (int64_t n = parts.begin(part); n < parts.begin(part + 1); ++n)
          for (int i = 0; i < count; ++i) some[i] += rows[n * count + i];
        for (int i = 0; i < count; ++i) sum[i] = part == 0 ? some[i] : sum[i] + some[i];
      }
      for (int i = 0; i < count; ++i) bad += sum[i] * T(0);
    }
    return bad == bad;
  }

  const Call& call_;
  const int threads_;
  int wide_;  // samples of a lane group
  int64_t groups_;
  size_t thread_bytes_;
  char *memory_, *thread_memory_;
  Packed<T>* packed_;
  T** local_error_;
  Rows<T>* own_;
  Rows<const T>* read_;
  T** convolution_gradient_;
  int64_t* tasks_;
  double* loss_rows_;
  T *panels_, *gram_ = nullptr, *gram_packed_ = nullptr;
};

// One backward pass by torch's BLAS.
template <class T>
void run_in_rows(const Call& call) {
  const int threads = useful_threads(call);
  Call output = call;  // the last layer alone, for the loss
  output.layers = &call.layers[call.depth - 1], output.tensors = &call.tensors[call.depth - 1], output.depth = 1;
  const auto shared = [](const Call& of, double* loss_rows, double label_scale) {
    return Shared<T>{of, nullptr, nullptr, nullptr, nullptr, nullptr, loss_rows, label_scale};
  };
  Arena counted{nullptr};
  counted.take<double>(call.batch);
  RowPass<T>(shared(call, nullptr, 0), threads, counted);
  Group<T, 1>(shared(output, nullptr, 0), counted);

  char* memory = static_cast<char*>(take_workspace(counted.used));
  Arena arena{memory};
  double* loss_rows = arena.take<double>(call.batch);
  const double label_scale = label_scale_of<T>(call);
  const Shared<T> whole = shared(call, loss_rows, label_scale), last = shared(output, loss_rows, label_scale);
  RowPass<T> pass(whole, threads, arena);
  Group<T, 1> group(last, arena);
  const size_t classes = output.layers->out().size();
  pass([&](int64_t count, auto body) { for_each<T>(threads, count, body); },
       [&](const T* outputs, T* error) {
         for (int64_t first = 0; first < call.batch; first += kLanes<T>)
           group.output_error_of(first, {outputs, classes}, {error, classes});
       });
  write_loss<T>(call, loss_rows);
  give_back_workspace(memory);
}

template <class T>
void run(const Call& call) {
  if (call.gemm != nullptr) return run_in_rows<T>(call);
  Run<T>{call}();
}

}  // namespace

void run_float(const Call& call) { run<float>(call); }
void run_double(const Call& call) { run<double>(call); }

PCFAST_END
