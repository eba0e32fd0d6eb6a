// Hands the sizes and codes that Python mirrors to the C interface.
#include <initializer_list>
#include <string>

#include "../abi.h"
#include "activations.cuh"
#include "geometry.h"
#include "program.h"

namespace pcfast::resident {
namespace {

template <class Values>
void append(std::string& text, const char* name, const Values& values) {
  text += name;
  for (const int value : values) text += ' ' + std::to_string(value);
  text += '\n';
}

#define PCFAST_APPEND(name) append(text, #name, {name})

void append(std::string& text, const char* name, std::initializer_list<int> values) {
  append<std::initializer_list<int>>(text, name, values);
}

std::string constants() {
  std::string text;
  PCFAST_APPEND(kWarpSize);
  PCFAST_APPEND(kMmaM);
  PCFAST_APPEND(kMmaN);
  PCFAST_APPEND(kTf32MmaK);
  PCFAST_APPEND(kBf16MmaK);

  PCFAST_APPEND(kMaxLayers);
  PCFAST_APPEND(kMaxThreads);
  PCFAST_APPEND(kMaxElements);
  PCFAST_APPEND(kVecSize);
  PCFAST_APPEND(kMaxGroup);
  PCFAST_APPEND(kFeedbackRowsPerLane);
  PCFAST_APPEND(kPositionsPerLane);
  append(text, "kConvRows", kConvRows);
  PCFAST_APPEND(kMaxLinearTilesM);
  PCFAST_APPEND(kMaxConvTilesN);
  PCFAST_APPEND(kConvTilesM);
  PCFAST_APPEND(kWideConvTilesM);

  PCFAST_APPEND(kNoProduct);
  PCFAST_APPEND(kCopy);
  PCFAST_APPEND(kConv);
  PCFAST_APPEND(kLinear);
  PCFAST_APPEND(kIeee);
  PCFAST_APPEND(kTf32);
  PCFAST_APPEND(kBf16);
  PCFAST_APPEND(kNoPool);
  PCFAST_APPEND(kMaxPool);
  PCFAST_APPEND(kAvgPool);
  PCFAST_APPEND(kCrossEntropy);
  PCFAST_APPEND(kMse);

  PCFAST_APPEND(kIdentity);
  PCFAST_APPEND(kRelu);
  PCFAST_APPEND(kLeakyRelu);
  PCFAST_APPEND(kTanh);
  PCFAST_APPEND(kSigmoid);
  PCFAST_APPEND(kSilu);
  PCFAST_APPEND(kGelu);
  PCFAST_APPEND(kGeluTanh);
  return text;
}

#undef PCFAST_APPEND

}  // namespace
}  // namespace pcfast::resident

extern "C" const char* pcfast_resident_constants() {
  static const std::string text = pcfast::resident::constants();
  return text.c_str();
}
