// NF4 on the CPU: dequantize to fp32, bf16 or fp16, and quantize, for AVX-512, AVX2 and any other
// CPU.
//
//   value[i]  = CODE[nibble[i]] * absmax[i / 64]                           (fp32, rounded once)
//   absmax[j] = map[byte[j]] * nested_absmax[j / 256] + offset             (nested quantization)
//
// A plain C interface for ctypes: no Python, no torch. Blocks of 64 weights are 32 bytes, the first
// weight of a pair in the high nibble. A block has only 16 different values: every path rounds 16
// products per block and looks its 64 weights up.
//
// NaN and infinity: a dequantized NaN is quiet, its payload unspecified; quantizing a block with a
// NaN gives absmax NaN and nibbles 15, one with an infinity absmax infinity, nibble 15 for the
// infinities and 7 for the rest: what bitsandbytes' CPU backend does.
//
// Must be built with -ffp-contract=off: un-nesting rounds the product and the sum, as torch does.

#include <type_traits>

#include "nf4.h"

#ifdef X86
#include "nf4_x86.h"
#endif

namespace {

// ---------------------------------------------------------------------------------- portable

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_fp16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13));
}

template <Type TYPE>
void decode_portable(const uint8_t* packed, const float* absmax, int64_t blocks, void* out) {
  using Value = std::conditional_t<TYPE == FP32, float, uint16_t>;
  Value table[16], *to = static_cast<Value*>(out);
  for (int64_t b = 0; b < blocks; ++b, packed += BYTES, to += BLOCK) {
    for (int i = 0; i < 16; ++i) {
      const float value = CODE[i] * absmax[b];
      if constexpr (TYPE == FP32) table[i] = value;
      if constexpr (TYPE == BF16) table[i] = to_bf16(value);
      if constexpr (TYPE == FP16) table[i] = to_fp16(value);
    }
    for (int i = 0; i < BYTES; ++i) {
      to[2 * i] = table[packed[i] >> 4];
      to[2 * i + 1] = table[packed[i] & 15];
    }
  }
}

template <Type TYPE>
void quantize_portable(const void* weight, int64_t blocks, uint8_t* packed, float* absmax) {
  for (int64_t b = 0; b < blocks; ++b, packed += BYTES) {
    float values[BLOCK];
    uint32_t bits[BLOCK], largest = 0;
    for (int i = 0; i < BLOCK; ++i) values[i] = load_portable<TYPE>(weight, b * BLOCK + i);
    std::memcpy(bits, values, sizeof bits);
    for (int i = 0; i < BLOCK; ++i) {
      const uint32_t magnitude = bits[i] & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = reciprocal(largest, absmax + b);
    for (int i = 0; i < BYTES; ++i) {
      int nibble[2];
      for (int j = 0; j < 2; ++j) {
        const float value = values[2 * i + j] * scale;
        int k = 0;
        for (int l = 0; l < 4; ++l) k = 2 * k + !(value <= LEVEL[l][k]);  // NaN goes up
        nibble[j] = k;
      }
      packed[i] = static_cast<uint8_t>(nibble[0] << 4 | nibble[1]);
    }
  }
}

// ---------------------------------------------------------------------------------- the choice

#ifdef X86
#define ALL(kernel)                                                 \
  {                                                                 \
    {kernel##_portable<FP32>, kernel##_portable<BF16>, kernel##_portable<FP16>}, \
    {kernel##_avx2<FP32>, kernel##_avx2<BF16>, kernel##_avx2<FP16>},             \
    {kernel##_avx512<FP32>, kernel##_avx512<BF16>, kernel##_avx512<FP16>},       \
  }
#else
#define ALL(kernel) {{kernel##_portable<FP32>, kernel##_portable<BF16>, kernel##_portable<FP16>}}
#endif

constexpr Decode DECODE[ISAS][TYPES] = ALL(decode);
constexpr Quantize QUANTIZE[ISAS][TYPES] = ALL(quantize);

}  // namespace

// ------------------------------------------------------------------------------- the interface

// Incremented whenever a signature here or in int8.cpp changes; native.py ignores a library with
// another number.
EXPORT int fluxfast_abi() { return 2; }

// 0 portable, 1 AVX2, 2 AVX-512: the best this CPU has.
EXPORT int fluxfast_isa() { return best_isa(); }

// 1 if the build has OpenMP; without it one thread does the work.
EXPORT int fluxfast_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// Dequantizes packed [blocks * 32] into out [blocks * 64] of `type` (0 fp32, 1 bf16, 2 fp16).
// Plain: absmax [blocks], the four after it null. Nested: absmax null, codes [blocks], nested
// [ceil(blocks / 256)], offset one value (offset_step 0) or one per 256 blocks (1), map [256].
// Returns 0, or 1 where the CPU lacks `isa` or `type` is unknown.
EXPORT int fluxfast_nf4_decode(const uint8_t* packed, const float* absmax, const uint8_t* codes,
                               const float* nested, const float* offset, int64_t offset_step,
                               const float* map, int64_t blocks, void* out, int type, int isa,
                               int threads) {
  if (type < 0 || type >= TYPES || isa < 0 || isa > best_isa()) return 1;
  const Decode decode = DECODE[isa][type];
  const int64_t chunks = (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK;
  const int64_t bytes = static_cast<int64_t>(NESTED_BLOCK) * BLOCK * (type == FP32 ? 4 : 2);
  if (threads > chunks) threads = static_cast<int>(chunks);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = c * NESTED_BLOCK;
    const int64_t count = blocks - first < NESTED_BLOCK ? blocks - first : NESTED_BLOCK;
    const float* scales = absmax + first;
    float unnested[NESTED_BLOCK];
    if (codes) {
      const float add = offset[c * offset_step];
      for (int64_t j = 0; j < count; ++j) unnested[j] = map[codes[first + j]] * nested[c] + add;
      scales = unnested;
    }
    decode(packed + first * BYTES, scales, count, static_cast<char*>(out) + c * bytes);
  }
  return 0;
}

// Quantizes weight [blocks * 64] of `type` into packed [blocks * 32] and absmax [blocks]. Returns
// as above.
EXPORT int fluxfast_nf4_quantize(const void* weight, int type, int64_t blocks, uint8_t* packed,
                                 float* absmax, int isa, int threads) {
  if (type < 0 || type >= TYPES || isa < 0 || isa > best_isa()) return 1;
  const Quantize quantize = QUANTIZE[isa][type];
  const int64_t chunks = (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK;
  const int64_t bytes = static_cast<int64_t>(NESTED_BLOCK) * BLOCK * (type == FP32 ? 4 : 2);
  if (threads > chunks) threads = static_cast<int>(chunks);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = c * NESTED_BLOCK;
    const int64_t count = blocks - first < NESTED_BLOCK ? blocks - first : NESTED_BLOCK;
    quantize(static_cast<const char*>(weight) + c * bytes, count, packed + first * BYTES,
             absmax + first);
  }
  return 0;
}
