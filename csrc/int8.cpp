// Row-wise int8 quantization on the CPU, of fp32, bf16 or fp16 values and of NF4 weights, for
// AVX-512, AVX2 and any other CPU.
//
//   v = x [* channel]          or CODE[nibble] * absmax                    (fp32, rounded once)
//   floor = max(largest |v| of the row, 1e-30)                             (NF4: largest |absmax|)
//   code = round(v * (127 / floor));   scale = floor * fp32(1 / 127)       (to nearest even)
//
// A row with a NaN or an infinity: its scale is NaN and its codes are 0.
//
// No clamp is needed: |v| <= floor, and the division and the product each add at most half a unit
// in the last place, so that v * (127 / floor) stays below 127.5.
//
// Must be built with -ffp-contract=off, see nf4.cpp.

#include "int8.h"

#ifdef X86
#include "int8_x86.h"
#endif

namespace {

// ---------------------------------------------------------------------------------- portable

template <Type TYPE>
uint32_t largest_portable(const void* x, const float* channel, int64_t columns) {
  return largest_from<TYPE>(0, x, channel, columns);
}

template <Type TYPE>
void encode_portable(const void* x, const float* channel, int64_t columns, float inverse,
                     int8_t* codes) {
  encode_from<TYPE>(0, x, channel, columns, inverse, codes);
}

void nf4_portable(const uint8_t* packed, const float* absmax, int64_t blocks, float inverse,
                  int8_t* codes) {
  for (int64_t b = 0; b < blocks; ++b, packed += BYTES, codes += BLOCK) {
    int8_t table[16];
    for (int i = 0; i < 16; ++i) table[i] = to_code((CODE[i] * absmax[b]) * inverse);
    for (int i = 0; i < BYTES; ++i) {
      codes[2 * i] = table[packed[i] >> 4];
      codes[2 * i + 1] = table[packed[i] & 15];
    }
  }
}

// ---------------------------------------------------------------------------------- the choice

#define TYPED(kernel) {kernel<FP32>, kernel<BF16>, kernel<FP16>}

#ifdef X86
#define ALL(kernel) {TYPED(kernel##_portable), TYPED(kernel##_avx2), TYPED(kernel##_avx512)}
constexpr EncodeNf4 NF4[ISAS] = {nf4_portable, nf4_avx2, nf4_avx512};
#else
#define ALL(kernel) {TYPED(kernel##_portable)}
constexpr EncodeNf4 NF4[ISAS] = {nf4_portable};
#endif

constexpr Largest LARGEST[ISAS][TYPES] = ALL(largest);
constexpr Encode ENCODE[ISAS][TYPES] = ALL(encode);

// Returns 127 / floor, or 0 where the largest magnitude is not finite.
float inverse_of(uint32_t magnitude, float* scale) {
  float amax;
  std::memcpy(&amax, &magnitude, 4);
  const bool finite = magnitude < 0x7f800000;
  const float floor = amax < 1e-30f ? 1e-30f : amax;
  *scale = finite ? floor * static_cast<float>(1.0 / 127.0) : __builtin_nanf("");
  return finite ? 127.0f / floor : 0.0f;
}

// A second thread gains from 64 Ki values on, with NF4 from 256 Ki (EPYC guest, 2 CPUs).
constexpr int64_t SHARE = 1 << 15, NF4_SHARE = 1 << 17;

int threads_for(int64_t rows, int64_t columns, int64_t share, int threads) {
  const int64_t shares = rows * columns / share;
  const int64_t most = shares < rows ? shares : rows;
  return threads < most ? threads : most < 1 ? 1 : static_cast<int>(most);
}

}  // namespace

// ------------------------------------------------------------------------------- the interface

// x [rows, columns] of `type` (0 fp32, 1 bf16, 2 fp16), row_stride values from one row to the next,
// channel [columns] or null. Writes codes [rows, columns] and scale [rows].
// Returns 0, or 1 where the CPU lacks `isa` or `type` is unknown.
EXPORT int fluxfast_rows_int8(const void* x, int type, int64_t rows, int64_t columns,
                              int64_t row_stride, const float* channel, int8_t* codes,
                              float* scale, int isa, int threads) {
  if (type < 0 || type >= TYPES || isa < 0 || isa > best_isa()) return 1;
  const Largest largest = LARGEST[isa][type];
  const Encode encode = ENCODE[isa][type];
  const int64_t row_bytes = row_stride * (type == FP32 ? 4 : 2);
  threads = threads_for(rows, columns, SHARE, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const void* row = static_cast<const char*>(x) + r * row_bytes;
    int8_t* to = codes + r * columns;
    const float inverse = inverse_of(largest(row, channel, columns), scale + r);
    if (inverse == 0.0f) std::memset(to, 0, columns);
    else encode(row, channel, columns, inverse, to);
  }
  return 0;
}

// packed [rows * columns / 2], absmax [rows * columns / 64], columns a multiple of 64. Writes codes
// [rows, columns] and scale [rows]. Returns 0, or 1 where the CPU lacks `isa`.
EXPORT int fluxfast_nf4_int8(const uint8_t* packed, const float* absmax, int64_t rows,
                             int64_t columns, int8_t* codes, float* scale, int isa, int threads) {
  if (isa < 0 || isa > best_isa()) return 1;
  const int64_t blocks = columns / BLOCK;
  threads = threads_for(rows, columns, NF4_SHARE, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const float* scales = absmax + r * blocks;
    int8_t* to = codes + r * columns;
    const float inverse = inverse_of(LARGEST[isa][FP32](scales, nullptr, blocks), scale + r);
    if (inverse == 0.0f) std::memset(to, 0, columns);
    else NF4[isa](packed + r * blocks * BYTES, scales, blocks, inverse, to);
  }
  return 0;
}
