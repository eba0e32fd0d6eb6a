// bfloat16, rounded as the GPU rounds it.
#pragma once

#include <bit>
#include <cstdint>

namespace pcfast::host {

constexpr std::uint32_t kFloatSignless = 0x7FFFFFFF;
constexpr std::uint32_t kFloatInfinity = 0x7F800000;

constexpr int kBfloat16Shift = 16;  // a bfloat16 is the upper half of a float32
constexpr std::uint16_t kBfloat16NaN = 0x7FFF;

struct Bfloat16 {
  std::uint16_t bits;
};

constexpr bool is_nan_bits(std::uint32_t bits) { return (bits & kFloatSignless) > kFloatInfinity; }

// To nearest, ties to even; every NaN becomes the same one.
constexpr Bfloat16 round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (is_nan_bits(bits)) return {kBfloat16NaN};
  constexpr std::uint32_t kJustUnderHalf = (1u << (kBfloat16Shift - 1)) - 1;
  const std::uint32_t odd = bits >> kBfloat16Shift & 1;
  return {static_cast<std::uint16_t>((bits + kJustUnderHalf + odd) >> kBfloat16Shift)};
}

constexpr float widen_bfloat16(Bfloat16 value) {
  return std::bit_cast<float>(std::uint32_t{value.bits} << kBfloat16Shift);
}

}  // namespace pcfast::host
