// Shared by all of csrc/: value types, choice of the instruction set, loads as fp32.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")))
#define AVX2 __attribute__((target("avx2,f16c")))
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Type { FP32, BF16, FP16, TYPES };
enum Isa { PORTABLE, WITH_AVX2, WITH_AVX512, ISAS };

// Asked once: CPUID traps to the hypervisor of a virtual machine (7 us on an EPYC guest).
inline Isa best_isa() {
#ifdef X86
  static const Isa best = [] {
    __builtin_cpu_init();
    unsigned eax, ebx, ecx = 0, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    if (!f16c || !__builtin_cpu_supports("avx2")) return PORTABLE;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 ? WITH_AVX512 : WITH_AVX2;
  }();
  return best;
#else
  return PORTABLE;
#endif
}

// ---------------------------------------------------------------- one value, or a register of them

inline float from_fp16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  float value;
  if (rest < 0x400) {
    value = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t rebias = (rest < 0x7c00 ? 112u : 224u) << 23;
  const uint32_t bits = sign | ((rest << 13) + rebias);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <Type TYPE>
inline float load_portable(const void* from, int64_t i) {
  if constexpr (TYPE == FP32) return static_cast<const float*>(from)[i];
  const uint16_t half = static_cast<const uint16_t*>(from)[i];
  if constexpr (TYPE == FP16) return from_fp16(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#ifdef X86

template <Type TYPE>
AVX512 inline __m512 load_avx512(const void* from, int64_t i) {
  if constexpr (TYPE == FP32) return _mm512_loadu_ps(static_cast<const float*>(from) + i);
  const __m256i half = _mm256_loadu_si256((const __m256i*)(static_cast<const uint16_t*>(from) + i));
  if constexpr (TYPE == FP16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <Type TYPE>
AVX2 inline __m256 load_avx2(const void* from, int64_t i) {
  if constexpr (TYPE == FP32) return _mm256_loadu_ps(static_cast<const float*>(from) + i);
  const __m128i half = _mm_loadu_si128((const __m128i*)(static_cast<const uint16_t*>(from) + i));
  if constexpr (TYPE == FP16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

#endif

}  // namespace
