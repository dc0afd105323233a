// NF4 with AVX-512 and with AVX2 + F16C. Compiled for any x86-64; nf4.cpp checks what the CPU
// supports.
//
// The look-up of a block's 16 rounded products is one VPERMW (AVX-512) per 32 weights, or one
// VPSHUFB (AVX2) per 32 weights and byte of a value.
// VCVTNEPS2BF16 is not used: it flushes denormals to zero, which torch's rounding does not.

#pragma once

#include "nf4.h"

namespace {

// ---------------------------------------------------------------------------------- AVX-512

AVX512 inline __m512i round_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}

template <Type TYPE>
AVX512 void decode_avx512(const uint8_t* packed, const float* absmax, int64_t blocks, void* out) {
  const __m512 code = _mm512_load_ps(CODE);
  char* to = static_cast<char*>(out);
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512 values = _mm512_mul_ps(code, _mm512_set1_ps(absmax[b]));
    if constexpr (TYPE == FP32) {
      for (int i = 0; i < 4; ++i, packed += 8, to += 64) {
        // one byte to two 32-bit lanes, high nibble first; the look-up reads 4 bits of a lane
        const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)packed));
        const __m512i index =
            _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        _mm512_storeu_ps(to, _mm512_permutexvar_ps(index, values));
      }
    } else {
      const __m256i half = TYPE == BF16
                               ? _mm512_cvtepi32_epi16(round_to_bf16(values))
                               : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
      // the look-up reads 5 bits of a 16-bit lane: the register holds the table twice
      const __m512i table = _mm512_broadcast_i64x4(half);
      for (int i = 0; i < 2; ++i, packed += 16, to += 64) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
        const __m512i index =
            _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, table));
      }
    }
  }
}

template <Type TYPE>
AVX512 void quantize_avx512(const void* weight, int64_t blocks, uint8_t* packed, float* absmax) {
  const __m512i low = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
  __m512 level[4];
  for (int l = 0; l < 4; ++l) level[l] = _mm512_castps256_ps512(_mm256_load_ps(LEVEL[l]));
  level[0] = _mm512_set1_ps(LEVEL[0][0]);
  for (int64_t b = 0; b < blocks; ++b) {
    __m512 value[4];
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < 4; ++i) {
      value[i] = load_avx512<TYPE>(weight, b * BLOCK + i * 16);
      const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value[i]), low);
      largest = _mm512_max_epu32(largest, magnitude);
    }
    const __m512 scale = _mm512_set1_ps(reciprocal(_mm512_reduce_max_epu32(largest), absmax + b));
    for (int i = 0; i < 4; ++i, packed += 8) {
      const __m512 scaled = _mm512_mul_ps(value[i], scale);
      __mmask16 above = _mm512_cmp_ps_mask(scaled, level[0], _CMP_NLE_UQ);
      __m512i k = _mm512_maskz_mov_epi32(above, one);
      for (int l = 1; l < 4; ++l) {
        above = _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(k, level[l]), _CMP_NLE_UQ);
        k = _mm512_add_epi32(k, k);
        k = _mm512_mask_or_epi32(k, above, k, one);
      }
      const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(k, 4), _mm512_srli_epi64(k, 32));
      _mm_storel_epi64((__m128i*)packed, _mm512_cvtepi64_epi8(pair));
    }
  }
}

// ------------------------------------------------------------------------------------- AVX2

AVX2 inline __m256i round_to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

template <Type TYPE>
AVX2 void decode_avx2(const uint8_t* packed, const float* absmax, int64_t blocks, void* out) {
  const __m256 code[2] = {_mm256_load_ps(CODE), _mm256_load_ps(CODE + 8)};
  char* to = static_cast<char*>(out);
  for (int64_t b = 0; b < blocks; ++b) {
    const __m256 scale = _mm256_set1_ps(absmax[b]);
    const __m256 first = _mm256_mul_ps(code[0], scale), second = _mm256_mul_ps(code[1], scale);
    if constexpr (TYPE == FP32) {
      for (int i = 0; i < 8; ++i, packed += 4, to += 32) {
        int32_t four;
        std::memcpy(&four, packed, 4);
        const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        const __m256i index =
            _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
        // the look-up reads 3 bits of a lane; the fourth, moved to the sign, picks the table
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        const __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index),
                                              _mm256_permutevar8x32_ps(second, index), upper);
        _mm256_storeu_ps(reinterpret_cast<float*>(to), found);
      }
    } else {
      __m128i words[2];  // the 16 values; then their low bytes and their high bytes
      if constexpr (TYPE == BF16) {
        const __m256i mixed = _mm256_packus_epi32(round_to_bf16(first), round_to_bf16(second));
        const __m256i all = _mm256_permute4x64_epi64(mixed, 0xd8);
        words[0] = _mm256_castsi256_si128(all), words[1] = _mm256_extracti128_si256(all, 1);
      } else {
        words[0] = _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT);
        words[1] = _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT);
      }
      const __m128i byte_mask = _mm_set1_epi16(0xff);
      const __m256i low = _mm256_broadcastsi128_si256(_mm_packus_epi16(
          _mm_and_si128(words[0], byte_mask), _mm_and_si128(words[1], byte_mask)));
      const __m256i high = _mm256_broadcastsi128_si256(
          _mm_packus_epi16(_mm_srli_epi16(words[0], 8), _mm_srli_epi16(words[1], 8)));
      for (int i = 0; i < 2; ++i, packed += 16, to += 64) {
        const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)packed));
        const __m256i index = _mm256_and_si256(
            _mm256_or_si256(_mm256_srli_epi16(byte, 4), _mm256_slli_epi16(byte, 8)),
            _mm256_set1_epi8(15));
        const __m256i lows = _mm256_shuffle_epi8(low, index);
        const __m256i highs = _mm256_shuffle_epi8(high, index);
        const __m256i a = _mm256_unpacklo_epi8(lows, highs);  // values 0-7 and 16-23
        const __m256i c = _mm256_unpackhi_epi8(lows, highs);  // values 8-15 and 24-31
        _mm256_storeu_si256((__m256i*)to, _mm256_permute2x128_si256(a, c, 0x20));
        _mm256_storeu_si256((__m256i*)(to + 32), _mm256_permute2x128_si256(a, c, 0x31));
      }
    }
  }
}

template <Type TYPE>
AVX2 void quantize_avx2(const void* weight, int64_t blocks, uint8_t* packed, float* absmax) {
  const __m256i low_bits = _mm256_set1_epi32(0x7fffffff);
  // byte 0 of each 64-bit lane to the front of its half
  const __m256i front = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                         -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                         -1, -1);
  __m256 level[4];
  for (int l = 0; l < 4; ++l) level[l] = _mm256_load_ps(LEVEL[l]);
  level[0] = _mm256_set1_ps(LEVEL[0][0]);
  for (int64_t b = 0; b < blocks; ++b) {
    __m256 value[8];
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < 8; ++i) {
      value[i] = load_avx2<TYPE>(weight, b * BLOCK + i * 8);
      const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(value[i]), low_bits);
      most = _mm256_max_epu32(most, magnitude);
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, most);
    uint32_t largest = 0;
    for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
    const __m256 scale = _mm256_set1_ps(reciprocal(largest, absmax + b));
    for (int i = 0; i < 8; ++i, packed += 4) {
      const __m256 scaled = _mm256_mul_ps(value[i], scale);
      __m256i k = _mm256_setzero_si256();
      for (int l = 0; l < 4; ++l) {
        const __m256 border = l ? _mm256_permutevar8x32_ps(level[l], k) : level[0];
        const __m256 above = _mm256_cmp_ps(scaled, border, _CMP_NLE_UQ);  // -1 where true
        k = _mm256_sub_epi32(_mm256_add_epi32(k, k), _mm256_castps_si256(above));
      }
      const __m256i pair = _mm256_or_si256(_mm256_slli_epi64(k, 4), _mm256_srli_epi64(k, 32));
      const __m256i bytes = _mm256_shuffle_epi8(pair, front);
      const uint32_t two = _mm_cvtsi128_si32(_mm256_castsi256_si128(bytes));
      const uint32_t other = _mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1));
      const uint32_t four = two | other << 16;
      std::memcpy(packed, &four, 4);
    }
  }
}

}  // namespace
