// Tiles of a product whose second factor was packed to panels: what products and attention, forward and back, share.
//
// Every number is summed over the inner dimension in one order, whatever it is computed with.

#pragma once

#include "cpu.h"

#if defined(__x86_64__)
namespace {

// Outputs of a panel, and rows of a tile: 24 sums, two vectors of weights and one number stay in registers.
constexpr int64_t PANEL = 32, TILE = 12;
// Words of the inner dimension that a panel holds at most: it stays in the second level of the cache.
constexpr int64_t DEPTH = 1024;

// 32 bits of the inner dimension: one float32 or two bf16.
using word = uint32_t;
template <typename T>
constexpr int64_t PER_WORD = 4 / sizeof(T);

BF16 inline __attribute__((always_inline)) __m512 add_products(__m512 sum, __m512i a, __m512i b, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
BF16 inline __attribute__((always_inline)) __m512 add_products(__m512 sum, __m512i a, __m512i b, bf16) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

inline __mmask16 first_of_16(int64_t count) {
  return count >= 16 ? 0xffff : count > 0 ? __mmask16((1 << count) - 1) : __mmask16(0);
}

// Where a tile's sums go: to `sums` where more of the inner dimension follows or went before, in the end to `y`.
template <typename Out>
struct Goal {
  float* sums;
  bool first, last;
  const float* bias;
  Out* y;
  int64_t outputs, stride;
};

// ROWS rows, `stride` words apart, times a panel of `depth` words.
template <int ROWS, typename T, typename Out>
BF16 void tile(const word* x, int64_t stride, const word* panel, int64_t depth, const Goal<Out>& goal) {
  __m512 part[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    part[r][0] = goal.first ? _mm512_setzero_ps() : _mm512_loadu_ps(goal.sums + r * PANEL);
    part[r][1] = goal.first ? _mm512_setzero_ps() : _mm512_loadu_ps(goal.sums + r * PANEL + 16);
  }
  for (int64_t k = 0; k < depth; k++) {
    __m512i left = _mm512_loadu_si512(panel + k * PANEL), right = _mm512_loadu_si512(panel + k * PANEL + 16);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      __m512i row = _mm512_set1_epi32(int(x[r * stride + k]));
      part[r][0] = add_products(part[r][0], row, left, T{});
      part[r][1] = add_products(part[r][1], row, right, T{});
    }
  }
  if (!goal.last) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      _mm512_storeu_ps(goal.sums + r * PANEL, part[r][0]);
      _mm512_storeu_ps(goal.sums + r * PANEL + 16, part[r][1]);
    }
    return;
  }
  __mmask16 left = first_of_16(goal.outputs), right = first_of_16(goal.outputs - 16);
  __m512 zero = _mm512_setzero_ps();
  __m512 first = goal.bias ? _mm512_maskz_loadu_ps(left, goal.bias) : zero;
  __m512 second = goal.bias ? _mm512_maskz_loadu_ps(right, goal.bias + 16) : zero;
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    narrowed(goal.y + r * goal.stride, left, _mm512_add_ps(part[r][0], first));
    narrowed(goal.y + r * goal.stride + 16, right, _mm512_add_ps(part[r][1], second));
  }
}

template <typename T, typename Out>
void tile_of(int64_t rows, const word* x, int64_t stride, const word* panel, int64_t depth, const Goal<Out>& goal) {
  using Tile = void (*)(const word*, int64_t, const word*, int64_t, const Goal<Out>&);
  static constexpr Tile TILES[TILE] = {
      tile<1, T, Out>, tile<2, T, Out>, tile<3, T, Out>, tile<4, T, Out>,  tile<5, T, Out>,  tile<6, T, Out>,
      tile<7, T, Out>, tile<8, T, Out>, tile<9, T, Out>, tile<10, T, Out>, tile<11, T, Out>, tile<12, T, Out>};
  TILES[rows - 1](x, stride, panel, depth, goal);
}

// 16 rows of up to 16 words to 16 columns of a panel.
BF16 void turn_16(const word* w, int64_t stride, int64_t rows, __mmask16 mask, word* panel) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, w + i * stride) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(panel + i * PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(panel + (i + 4) * PANEL, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(panel + (i + 8) * PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_si512(panel + (i + 12) * PANEL, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

// The panel of a product with W^T: `rows` rows of W, its outputs.
BF16 void pack_rows(const word* w, int64_t stride, int64_t rows, int64_t depth, word* panel) {
  for (int64_t half = 0; half < 2; half++) {
    for (int64_t k = 0; k < depth; k += 16) {
      const word* from = w + 16 * half * stride + k;
      turn_16(from, stride, rows - 16 * half, first_of_16(depth - k), panel + k * PANEL + 16 * half);
    }
  }
}

// The panel of a product with W: `columns` columns of W, its outputs.
BF16 void pack_columns(const float* w, int64_t stride, int64_t columns, int64_t depth, word* panel) {
  __mmask16 left = first_of_16(columns), right = first_of_16(columns - 16);
  for (int64_t k = 0; k < depth; k++) {
    _mm512_storeu_si512(panel + k * PANEL, _mm512_maskz_loadu_epi32(left, w + k * stride));
    _mm512_storeu_si512(panel + k * PANEL + 16, _mm512_maskz_loadu_epi32(right, w + k * stride + 16));
  }
}
BF16 void pack_columns(const bf16* w, int64_t stride, int64_t columns, int64_t depth, word* panel) {
  __mmask32 mask = columns >= 32 ? ~__mmask32(0) : (__mmask32(1) << columns) - 1;
  // Numbers of the two rows of a word, in turns.
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t k = 0; k < depth; k++) {
    __m512i even = _mm512_maskz_loadu_epi16(mask, w + 2 * k * stride);
    __m512i odd = _mm512_maskz_loadu_epi16(mask, w + (2 * k + 1) * stride);
    __m512i left = _mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1);
    __m512i right = _mm512_inserti64x4(odd, _mm512_extracti64x4_epi64(even, 1), 0);
    _mm512_storeu_si512(panel + k * PANEL, _mm512_permutexvar_epi16(turns, left));
    _mm512_storeu_si512(panel + k * PANEL + 16, _mm512_permutexvar_epi16(turns, right));
  }
}

// Queries that go together, about.
constexpr int64_t QUERIES = 64;

// Numbers of a panel's sums for one row of a block.
template <typename T>
constexpr int64_t KEYS = PANEL / PER_WORD<T>;

// 16 numbers of e^x for x <= 0: exp_neg.
BF16 inline __m512 exp_neg_16(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  __m512 e = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
  __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_mul_ps(e, _mm512_castsi512_ps(power));
}

// `rows` rows of x, `stride` words apart, times a panel, to sums that lie 32 to a row; added to them but for `first`.
template <typename T>
BF16 void block(const T* x, int64_t stride, int64_t rows, const word* panel, int64_t depth, bool first, float* sums) {
  const word* words = reinterpret_cast<const word*>(x);
  for (int64_t r = 0; r < rows; r += TILE) {
    Goal<float> goal{sums + r * PANEL, first, false, nullptr, nullptr, 0, 0};
    tile_of<T>(std::min(TILE, rows - r), words + r * stride, stride, panel, depth, goal);
  }
}

}  // namespace
#endif
