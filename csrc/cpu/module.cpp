// The module pcfast._cpu: strict relaxation, and backpropagation, of a whole batch in one call; and what recognises a model.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "modules.h"
#include "program.h"

namespace py = pybind11;

// One object file of kernels.cpp for each, by CMakeLists.txt; the least first.
#if defined(__x86_64__)
#define PCFAST_CPU_ISAS(one) one(sse2) one(avx2) one(avx512)
#elif defined(__aarch64__)
#define PCFAST_CPU_ISAS(one) one(neon)
#else
#define PCFAST_CPU_ISAS(one) one(portable)
#endif
#define PCFAST_DECLARE(isa)          \
  namespace pcfast::cpu::isa {       \
  void run_float(const Call& call);  \
  void run_double(const Call& call); \
  }
PCFAST_CPU_ISAS(PCFAST_DECLARE)

namespace {

using namespace pcfast::cpu;

// Goes up with every change of what Python hands over; pcfast/support/cpu_module.py expects the same.
constexpr int kAbiVersion = 6;

#ifdef PCFAST_TORCHS_OPENMP
constexpr bool kTorchsOpenMP = true;
#else
constexpr bool kTorchsOpenMP = false;
#endif

struct InstructionSet {
  const char* name;
  void (*run_float)(const Call&);
  void (*run_double)(const Call&);
};

#define PCFAST_ENTRY(isa) {#isa, isa::run_float, isa::run_double},
constexpr InstructionSet kCompiled[] = {PCFAST_CPU_ISAS(PCFAST_ENTRY)};

bool runs_here([[maybe_unused]] const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
#endif
  return true;
}

const InstructionSet* chosen = nullptr;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> result;
  for (const InstructionSet& one : kCompiled)
    if (runs_here(one.name)) result.emplace_back(one.name);
  return result;
}

void use(const std::string& name) {
  for (const InstructionSet& one : kCompiled)
    if (one.name == name && runs_here(name)) {
      chosen = &one;
      return;
    }
  throw py::value_error("no kernels for '" + name + "' that run here");
}

using MapSizes = std::tuple<int, int, int>;
using Pair = std::tuple<int, int>;
using ActivationOf = std::tuple<int, double>;
using PoolOf = std::tuple<int, Pair, Pair, Pair, int, bool>;  // kind, window, stride, padding, divisor, counts_padding
using PointwiseOf = std::tuple<MapSizes, MapSizes, ActivationOf, PoolOf, ActivationOf>;  // from, to, before, pool, after

Map map_of(const MapSizes& sizes) { return {std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes)}; }
Activation activation_of(const ActivationOf& act) { return {std::get<0>(act), std::get<1>(act)}; }
Pool pool_of(const PoolOf& pool) {
  const auto& [kind, window, stride, padding, divisor, counts_padding] = pool;
  return {kind,    std::get<0>(window), std::get<1>(window), std::get<0>(stride), std::get<1>(stride), std::get<0>(padding),
          std::get<1>(padding), divisor, counts_padding};
}

Pointwise pointwise_of(const PointwiseOf& op) {
  const auto& [from, to, before, pool, after] = op;
  return {map_of(from), map_of(to), activation_of(before), pool_of(pool), activation_of(after)};
}

class Program {
 public:
  void add(int kind, const PointwiseOf& entry, const Pair& kernel, const Pair& stride, const Pair& padding,
           const PointwiseOf& tail, bool skip, double scale) {
    layers_.push_back({kind, pointwise_of(entry), std::get<0>(kernel), std::get<1>(kernel), std::get<0>(stride),
                       std::get<1>(stride), std::get<0>(padding), std::get<1>(padding), pointwise_of(tail), skip, scale});
  }

  // gemm: of torch's BLAS in this dtype, for one backward pass by rows; else 0. Pointers: by layer as LayerTensors has them, then x, labels, target, class_weight, loss_value, output_gradient.
  // Returns the stage and the layer of what first was not finite, or None, and whether a label is invalid.
  std::tuple<py::object, bool> run(int scalar_bytes, int threads, int64_t batch, int64_t iterations, bool relaxes, bool fresh,
                                   bool gram, bool updates, const std::vector<double>& scalars,
                                   double momentum, int loss, bool mean, bool every_row, int64_t ignored_label,
                                   double smoothing, double share, double loss_scale, std::uintptr_t gemm,
                                   const std::vector<std::uintptr_t>& pointers) const {
    constexpr size_t kPerLayer = sizeof(LayerTensors) / sizeof(void*), kOthers = 6;
    const size_t depth = layers_.size();
    if (depth == 0 || pointers.size() != depth * kPerLayer + kOthers || batch < 1 || threads < 1 || scalars.empty() ||
        scalars.size() < (relaxes ? (scalars.size() == 1 ? size_t{1} : size_t(iterations)) : depth) ||
        (scalar_bytes != 4 && scalar_bytes != 8))
      throw py::value_error("arguments that do not belong to this program");
    std::vector<double> repeated;
    const double* numbers = scalars.data();
    if (relaxes && scalars.size() == 1 && iterations > 1) {
      repeated.assign(iterations, scalars[0]);
      numbers = repeated.data();
    }
    std::vector<LayerTensors> tensors(depth);
    const auto pointer = [&](size_t i) { return reinterpret_cast<void*>(pointers[i]); };
    for (size_t l = 0; l < depth; ++l) {
      const size_t i = l * kPerLayer;
      tensors[l] = {pointer(i),     pointer(i + 1), pointer(i + 2), pointer(i + 3), pointer(i + 4),
                    pointer(i + 5), pointer(i + 6), pointer(i + 7)};
    }
    const size_t other = depth * kPerLayer;
    int64_t first_bad = kAllFinite;
    bool invalid_label = false;
    Call call{};
    call.layers = layers_.data(), call.depth = static_cast<int>(depth), call.threads = threads;
    call.batch = batch, call.iterations = iterations;
    call.relaxes = relaxes, call.fresh = fresh, call.gram = gram, call.updates = updates;
    call.step_sizes = call.factors = numbers, call.momentum = momentum;
    call.loss = loss, call.mean = mean, call.every_row = every_row, call.ignored_label = ignored_label;
    call.smoothing = smoothing, call.share = share, call.loss_scale = loss_scale;
    call.gemm = reinterpret_cast<const void*>(gemm);
    call.x = pointer(other), call.labels = static_cast<const int64_t*>(pointer(other + 1)), call.target = pointer(other + 2);
    call.class_weight = pointer(other + 3), call.tensors = tensors.data(), call.loss_value = pointer(other + 4);
    call.output_gradient = pointer(other + 5);
    call.first_bad = &first_bad, call.invalid_label = &invalid_label;
    {
      py::gil_scoped_release released;
      (scalar_bytes == 4 ? chosen->run_float : chosen->run_double)(call);
    }
    py::object bad = py::none();
    if (first_bad != kAllFinite) bad = py::make_tuple(first_bad / kStage, first_bad % kStage);
    return {bad, invalid_label};
  }

 private:
  std::vector<Layer> layers_;
};

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  use(instruction_sets().back());
  module.def("abi_version", [] { return kAbiVersion; });
  module.def("uses_the_openmp_of_torch", [] { return kTorchsOpenMP; });
  module.def("instruction_sets", instruction_sets);
  module.def("use", use);
  module.def("used", [] { return chosen->name; });
  module.def("modules_hold", &modules_hold);
  py::class_<Tensors>(module, "Tensors")
      .def(py::init<const py::list&>())
      .def("kinds_hold", &Tensors::kinds_hold)
      .def("places_hold", &Tensors::places_hold);
  py::class_<Program>(module, "Program").def(py::init<>()).def("add", &Program::add).def("run", &Program::run);
}
