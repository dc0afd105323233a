// Shared by int8.cpp and int8_x86.h: function types, and the portable kernels, which also do the
// end of a row that does not fill a register.

#pragma once

#include "nf4.h"

namespace {

// v[i] = x[i] of `type` * channel[i] (1 where null), fp32, for `columns` values of a row
// Returns the bits of the largest |v|: as integers, magnitudes are ordered like floats, NaN above.
using Largest = uint32_t (*)(const void* x, const float* channel, int64_t columns);
// codes = v * inverse, rounded to nearest even
using Encode = void (*)(const void* x, const float* channel, int64_t columns, float inverse,
                        int8_t* codes);
// Dequantizes and requantizes blocks of NF4, 64 int8 values each.
using EncodeNf4 = void (*)(const uint8_t* packed, const float* absmax, int64_t blocks,
                           float inverse, int8_t* codes);

constexpr uint32_t MAGNITUDE = 0x7fffffff;

// |scaled| <= 127 to within a rounding, see int8.cpp
inline int8_t to_code(float scaled) {
  constexpr float integers = 0x1.8p23f;  // adding it leaves no room for a fraction
  return static_cast<int8_t>(static_cast<int32_t>((scaled + integers) - integers));
}

template <Type TYPE>
inline float value_portable(const void* x, const float* channel, int64_t i) {
  const float value = load_portable<TYPE>(x, i);
  return channel ? value * channel[i] : value;
}

template <Type TYPE>
inline uint32_t largest_from(int64_t i, const void* x, const float* channel, int64_t columns) {
  uint32_t largest = 0;
  for (; i < columns; ++i) {
    const float value = value_portable<TYPE>(x, channel, i);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits &= MAGNITUDE;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

template <Type TYPE>
inline void encode_from(int64_t i, const void* x, const float* channel, int64_t columns,
                        float inverse, int8_t* codes) {
  for (; i < columns; ++i) codes[i] = to_code(value_portable<TYPE>(x, channel, i) * inverse);
}

}  // namespace
