// int8 rows with AVX-512 and with AVX2 + F16C. Compiled for any x86-64; int8.cpp checks what
// the CPU supports.
//
// Both read a row twice, for its largest magnitude and to quantize it, the second time from the
// cache. NF4: a block's 16 int8 values are one register, which VPSHUFB looks its 64 weights up in.

#pragma once

#include "int8.h"

namespace {

// ---------------------------------------------------------------------------------- AVX-512

template <Type TYPE>
AVX512 inline __m512 value_avx512(const void* x, const float* channel, int64_t i) {
  const __m512 value = load_avx512<TYPE>(x, i);
  return channel ? _mm512_mul_ps(value, _mm512_loadu_ps(channel + i)) : value;
}

template <Type TYPE>
AVX512 uint32_t largest_avx512(const void* x, const float* channel, int64_t columns) {
  const int64_t whole = columns & ~15;
  const __m512i low = _mm512_set1_epi32(MAGNITUDE);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < whole; i += 16) {
    const __m512i bits = _mm512_castps_si512(value_avx512<TYPE>(x, channel, i));
    most = _mm512_max_epu32(most, _mm512_and_si512(bits, low));
  }
  const uint32_t largest = _mm512_reduce_max_epu32(most);
  const uint32_t rest = largest_from<TYPE>(whole, x, channel, columns);
  return rest > largest ? rest : largest;
}

AVX512 inline __m128i codes_avx512(__m512 value, __m512 inverse) {
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)));
}

template <Type TYPE>
AVX512 void encode_avx512(const void* x, const float* channel, int64_t columns, float inverse,
                          int8_t* codes) {
  const int64_t whole = columns & ~15;
  const __m512 by = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < whole; i += 16) {
    const __m128i sixteen = codes_avx512(value_avx512<TYPE>(x, channel, i), by);
    _mm_storeu_si128((__m128i*)(codes + i), sixteen);
  }
  encode_from<TYPE>(whole, x, channel, columns, inverse, codes);
}

AVX512 void nf4_avx512(const uint8_t* packed, const float* absmax, int64_t blocks, float inverse,
                       int8_t* codes) {
  const __m512 code = _mm512_load_ps(CODE), by = _mm512_set1_ps(inverse);
  for (int64_t b = 0; b < blocks; ++b, packed += BYTES, codes += BLOCK) {
    const __m512 values = _mm512_mul_ps(code, _mm512_set1_ps(absmax[b]));
    const __m512i table = _mm512_broadcast_i32x4(codes_avx512(values, by));
    // one byte to two, high nibble first
    const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)packed));
    const __m512i both = _mm512_or_si512(_mm512_srli_epi16(byte, 4), _mm512_slli_epi16(byte, 8));
    const __m512i index = _mm512_and_si512(both, _mm512_set1_epi8(15));
    _mm512_storeu_si512(codes, _mm512_shuffle_epi8(table, index));
  }
}

// ------------------------------------------------------------------------------------- AVX2

template <Type TYPE>
AVX2 inline __m256 value_avx2(const void* x, const float* channel, int64_t i) {
  const __m256 value = load_avx2<TYPE>(x, i);
  return channel ? _mm256_mul_ps(value, _mm256_loadu_ps(channel + i)) : value;
}

template <Type TYPE>
AVX2 uint32_t largest_avx2(const void* x, const float* channel, int64_t columns) {
  const int64_t whole = columns & ~7;
  const __m256i low = _mm256_set1_epi32(MAGNITUDE);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256i bits = _mm256_castps_si256(value_avx2<TYPE>(x, channel, i));
    most = _mm256_max_epu32(most, _mm256_and_si256(bits, low));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256((__m256i*)lanes, most);
  uint32_t largest = largest_from<TYPE>(whole, x, channel, columns);
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// 16 int8 values of two registers
AVX2 inline __m128i codes_avx2(__m256 first, __m256 second, __m256 inverse) {
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(first, inverse));
  const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(second, inverse));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

template <Type TYPE>
AVX2 void encode_avx2(const void* x, const float* channel, int64_t columns, float inverse,
                      int8_t* codes) {
  const int64_t whole = columns & ~15;
  const __m256 by = _mm256_set1_ps(inverse);
  for (int64_t i = 0; i < whole; i += 16) {
    const __m256 first = value_avx2<TYPE>(x, channel, i);
    const __m256 second = value_avx2<TYPE>(x, channel, i + 8);
    _mm_storeu_si128((__m128i*)(codes + i), codes_avx2(first, second, by));
  }
  encode_from<TYPE>(whole, x, channel, columns, inverse, codes);
}

AVX2 void nf4_avx2(const uint8_t* packed, const float* absmax, int64_t blocks, float inverse,
                   int8_t* codes) {
  const __m256 code[2] = {_mm256_load_ps(CODE), _mm256_load_ps(CODE + 8)};
  const __m256 by = _mm256_set1_ps(inverse);
  for (int64_t b = 0; b < blocks; ++b) {
    const __m256 scale = _mm256_set1_ps(absmax[b]);
    const __m256 first = _mm256_mul_ps(code[0], scale), second = _mm256_mul_ps(code[1], scale);
    const __m256i table = _mm256_broadcastsi128_si256(codes_avx2(first, second, by));
    for (int i = 0; i < 2; ++i, packed += 16, codes += 32) {
      const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)packed));
      const __m256i both = _mm256_or_si256(_mm256_srli_epi16(byte, 4), _mm256_slli_epi16(byte, 8));
      const __m256i index = _mm256_and_si256(both, _mm256_set1_epi8(15));
      _mm256_storeu_si256((__m256i*)codes, _mm256_shuffle_epi8(table, index));
    }
  }
}

}  // namespace
