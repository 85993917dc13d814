// What the operations on a CPU share: bf16 and its rounding, sums across registers, tiles of products.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
// One body for several instruction sets, chosen when the library is loaded.
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline void store(float& to, float x) { to = x; }
// To nearest, ties to even; NaN stays NaN.
inline void store(bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}

// e^x within 2 ulp for x <= 0, in a form that compilers vectorise (Cephes' expf).
inline float exp_neg(float x) {
  x = std::max(x, -87.0f);
  float n = std::nearbyintf(x * 1.44269504f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  float e = p * r * r + r + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return e * scale;
}

// Work below this many numbers isn't worth a second thread.
constexpr int64_t SHARED_FROM = 1 << 15;

struct Heads {
  int64_t group, dims;
  float scale, softcap;
};

// Where keys and values of a pass or of an earlier one lie.
struct Source {
  const void *keys, *values;
  int64_t stride;
};
// Tokens in a row and how many of the spans they see; the last keys of these are their own.
struct Stretch {
  int64_t tokens, spans;
};
// Some rows of a source.
struct Rows {
  int64_t source, first, count;
};

#if defined(__x86_64__)
#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// Lane 4 * b + j is the sum of part[4 * j + b].
BF16 inline __attribute__((always_inline)) __m512 sums_of_4(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
BF16 inline __attribute__((always_inline)) __m512 sums_of_16(const __m512 (&part)[16]) {
  __m512 a = sums_of_4(part[0], part[1], part[2], part[3]), b = sums_of_4(part[4], part[5], part[6], part[7]);
  __m512 c = sums_of_4(part[8], part[9], part[10], part[11]), d = sums_of_4(part[12], part[13], part[14], part[15]);
  __m512 left = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 right = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(left, right, 0x44), _mm512_shuffle_ps(left, right, 0xee));
}

BF16 inline __attribute__((always_inline)) __m512 widened(const float* x, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, x);
}
BF16 inline __attribute__((always_inline)) __m512 widened(const bf16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

// Lane 4 * b + j is the product of row b of x with row j of w, both of `inner` numbers; row `last` of w stands in
// for those beyond it.
template <int ROWS, typename T>
BF16 inline __attribute__((always_inline)) __m512 wide_tile(const T* x, int64_t stride, const float* w, int64_t last,
                                                            int64_t inner) {
  __m512 part[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) part[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inner; k += 16) {
    __mmask16 mask = inner - k >= 16 ? __mmask16(0xffff) : __mmask16((1 << (inner - k)) - 1);
    __m512 weights[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) weights[j] = _mm512_maskz_loadu_ps(mask, w + (j < last ? j : last) * inner + k);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      __m512 row = widened(x + r * stride + k, mask);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) part[4 * j + r] = _mm512_fmadd_ps(row, weights[j], part[4 * j + r]);
    }
  }
  return sums_of_16(part);
}

BF16 inline __attribute__((always_inline)) void narrowed(float* to, __mmask16 mask, __m512 x) {
  _mm512_mask_storeu_ps(to, mask, x);
}
BF16 inline __attribute__((always_inline)) void narrowed(bf16* to, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

}  // namespace
