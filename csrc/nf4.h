// Shared by nf4.cpp and nf4_x86.h: the NF4 code book, its search tree, and function types.

#pragma once

#include "cpu.h"

namespace {

constexpr int BLOCK = 64, BYTES = BLOCK / 2, NESTED_BLOCK = 256;

// QLoRA (arXiv 2305.14314), appendix E, as fp32 prints them
alignas(64) constexpr float CODE[16] = {
    -1.0f,                -0.6961928009986877f, -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f,  0.7229568362236023f,   1.0f};

constexpr float bound(int i) { return (CODE[i] + CODE[i + 1]) / 2; }

// The 15 bounds between neighboring entries of the code book as a search tree, one level a row: at
// each level k becomes 2k + (value above LEVEL[l][k]); after four levels k is the nibble.
alignas(64) constexpr float LEVEL[4][8] = {
    {bound(7)},
    {bound(3), bound(11)},
    {bound(1), bound(5), bound(9), bound(13)},
    {bound(0), bound(2), bound(4), bound(6), bound(8), bound(10), bound(12), bound(14)}};

// Dequantizes blocks of packed and absmax into 64 values per block.
using Decode = void (*)(const uint8_t* packed, const float* absmax, int64_t blocks, void* out);
// Quantizes 64 values per block into blocks of packed and absmax.
using Quantize = void (*)(const void* weight, int64_t blocks, uint8_t* packed, float* absmax);

// A block's reciprocal scale from the bits of its largest magnitude. As integers, magnitudes are
// ordered like floats, with NaN above infinity.
inline float reciprocal(uint32_t magnitude, float* absmax) {
  std::memcpy(absmax, &magnitude, 4);
  return 1.0f / (*absmax < 1e-38f ? 1e-38f : *absmax);
}

}  // namespace
