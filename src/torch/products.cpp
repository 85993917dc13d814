// Products of a frozen matrix with many rows, and of the narrow matrices of an adapter, for passes that train.
//
// What comes out of a row depends on that row alone, however many others there are and wherever it stands: every
// number is summed over the inner dimension in one order. libtorch's products of bf16 round by their shape, and a
// reference that was scored in other company than it is trained in would be another reference.
//
// Plain pointers come in; products.rs beside this file has checked shapes and types.

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

// y = x W^T + bias where W is [outputs, inner]; with `turned`, y = x W where W is [inner, outputs].
template <typename T, typename Out>
void multiply(const T* x, const T* w, const float* bias, int64_t rows, int64_t inner, int64_t outputs, bool turned,
              Out* y) {
  int64_t depth = inner / PER_WORD<T>, panels = (outputs + PANEL - 1) / PANEL, threads = omp_get_max_threads();
  // Few panels are cut by rows too, so that all threads have enough.
  int64_t cuts = std::max<int64_t>(1, std::min(rows / 96, (4 * threads + panels - 1) / panels));
  int64_t each = ((rows + cuts - 1) / cuts + TILE - 1) / TILE * TILE;
  const word* words = reinterpret_cast<const word*>(x);
#pragma omp parallel
  {
    // pack_rows writes 16 words at a time.
    std::vector<word> packed((std::min(depth, DEPTH) + 16) * PANEL + 16);
    std::vector<float> sums(depth > DEPTH ? each * PANEL : 0);
    word* panel = reinterpret_cast<word*>((reinterpret_cast<uintptr_t>(packed.data()) + 63) / 64 * 64);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t cut = 0; cut < cuts; cut++) {
        int64_t o = p * PANEL, here = std::min(PANEL, outputs - o), first = cut * each;
        int64_t end = std::min(rows, first + each);
        for (int64_t k = 0; k < depth; k += DEPTH) {
          int64_t deep = std::min(DEPTH, depth - k);
          if (turned) {
            pack_columns(w + k * PER_WORD<T> * outputs + o, outputs, here, deep, panel);
          } else {
            pack_rows(reinterpret_cast<const word*>(w) + o * depth + k, depth, here, deep, panel);
          }
          for (int64_t r = first; r < end; r += TILE) {
            Goal<Out> goal{sums.data() + (r - first) * PANEL, k == 0, k + deep == depth, bias ? bias + o : nullptr,
                           y + r * outputs + o, here, outputs};
            tile_of<T>(std::min(TILE, end - r), words + r * depth + k, depth, panel, deep, goal);
          }
        }
      }
    }
  }
}

// Rows that a thread takes at a time where matrices are narrow.
constexpr int64_t ROWS = 64;

// low = x A^T: x is [rows, inner], `stride` apart, A [rank, inner].
template <typename T>
BF16 void shrink_rows(const T* x, int64_t stride, const float* a, int64_t rows, int64_t inner, int64_t rank,
                      float* low) {
  float sums[16];
  for (int64_t r = 0; r < rows; r += 4) {
    int64_t here = std::min<int64_t>(4, rows - r);
    for (int64_t j = 0; j < rank; j += 4) {
      int64_t last = std::min<int64_t>(3, rank - 1 - j);
      const T* from = x + r * stride;
      switch (here) {
        case 1: _mm512_storeu_ps(sums, wide_tile<1>(from, stride, a + j * inner, last, inner)); break;
        case 2: _mm512_storeu_ps(sums, wide_tile<2>(from, stride, a + j * inner, last, inner)); break;
        case 3: _mm512_storeu_ps(sums, wide_tile<3>(from, stride, a + j * inner, last, inner)); break;
        default: _mm512_storeu_ps(sums, wide_tile<4>(from, stride, a + j * inner, last, inner));
      }
      for (int64_t i = 0; i < here; i++) std::memcpy(low + (r + i) * rank + j, sums + 4 * i, 4 * (last + 1));
    }
  }
}

// out += scale * low B for ROWS rows by 32 outputs: B is [rank, width], a row of out `stride` long.
template <int ROWS, typename Out>
BF16 inline void expand_tile(const float* low, int64_t rank, const float* b, int64_t width, __mmask16 left,
                             __mmask16 right, __m512 scale, Out* out, int64_t stride) {
  __m512 part[ROWS][2];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) part[r][0] = part[r][1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < rank; j++) {
    __m512 first = _mm512_maskz_loadu_ps(left, b + j * width), second = _mm512_maskz_loadu_ps(right, b + j * width + 16);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      __m512 factor = _mm512_set1_ps(low[r * rank + j]);
      part[r][0] = _mm512_fmadd_ps(factor, first, part[r][0]);
      part[r][1] = _mm512_fmadd_ps(factor, second, part[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    Out* to = out + r * stride;
    narrowed(to, left, _mm512_fmadd_ps(scale, part[r][0], widened(to, left)));
    if (right) narrowed(to + 16, right, _mm512_fmadd_ps(scale, part[r][1], widened(to + 16, right)));
  }
}

template <typename Out>
BF16 void expand_rows(const float* low, const float* b, int64_t rows, int64_t rank, int64_t width, float scale,
                      Out* out, int64_t stride) {
  __m512 factor = _mm512_set1_ps(scale);
  for (int64_t o = 0; o < width; o += 32) {
    __mmask16 left = first_of_16(width - o), right = first_of_16(width - o - 16);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      expand_tile<4>(low + r * rank, rank, b + o, width, left, right, factor, out + r * stride + o, stride);
    }
    for (; r < rows; r++) {
      expand_tile<1>(low + r * rank, rank, b + o, width, left, right, factor, out + r * stride + o, stride);
    }
  }
}

// to[RANK, 32 columns] += scale * low^T x: low is [rows, rank], x's rows are `stride` apart.
template <int RANK, typename T>
BF16 void outer_tile(const float* low, int64_t rank, const T* x, int64_t stride, int64_t rows, __mmask16 left,
                     __mmask16 right, __m512 scale, float* to, int64_t width) {
  __m512 part[RANK][2];
#pragma GCC unroll 8
  for (int j = 0; j < RANK; j++) part[j][0] = part[j][1] = _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; r++) {
    __m512 first = widened(x + r * stride, left), second = widened(x + r * stride + 16, right);
#pragma GCC unroll 8
    for (int j = 0; j < RANK; j++) {
      __m512 factor = _mm512_set1_ps(low[r * rank + j]);
      part[j][0] = _mm512_fmadd_ps(factor, first, part[j][0]);
      part[j][1] = _mm512_fmadd_ps(factor, second, part[j][1]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < RANK; j++) {
    float* at = to + j * width;
    narrowed(at, left, _mm512_fmadd_ps(scale, part[j][0], widened(at, left)));
    narrowed(at + 16, right, _mm512_fmadd_ps(scale, part[j][1], widened(at + 16, right)));
  }
}

template <typename T>
void outer_columns(const float* low, int64_t rank, const T* x, int64_t stride, int64_t rows, int64_t columns,
                   float scale, float* to, int64_t width) {
  __mmask16 left = first_of_16(columns), right = first_of_16(columns - 16);
  using Tile = void (*)(const float*, int64_t, const T*, int64_t, int64_t, __mmask16, __mmask16, __m512, float*, int64_t);
  static constexpr Tile TILES[8] = {outer_tile<1, T>, outer_tile<2, T>, outer_tile<3, T>, outer_tile<4, T>,
                                    outer_tile<5, T>, outer_tile<6, T>, outer_tile<7, T>, outer_tile<8, T>};
  for (int64_t j = 0; j < rank; j += 8) {
    int64_t here = std::min<int64_t>(8, rank - j);
    [&]() BF16 {
      TILES[here - 1](low + j, rank, x, stride, rows, left, right, _mm512_set1_ps(scale), to + j * width, width);
    }();
  }
}

template <typename T>
void shrink(const T* x, int64_t stride, const float* a, int64_t rows, int64_t inner, int64_t rank, float* low) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r += ROWS) {
    shrink_rows(x + r * stride, stride, a, std::min(ROWS, rows - r), inner, rank, low + r * rank);
  }
}

template <typename Out>
void expand(const float* low, const float* b, int64_t rows, int64_t rank, int64_t width, float scale, Out* out,
            int64_t stride) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r += ROWS) {
    expand_rows(low + r * rank, b, std::min(ROWS, rows - r), rank, width, scale, out + r * stride, stride);
  }
}

template <typename T>
void outer(const float* low, const T* x, int64_t stride, int64_t rows, int64_t rank, int64_t width, float scale,
           float* to) {
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < width; o += 32) {
    outer_columns(low, rank, x + o, stride, rows, std::min<int64_t>(32, width - o), scale, to + o, width);
  }
}

}  // namespace

extern "C" {

void flowrun_multiply_bf16(const bf16* x, const bf16* w, const float* bias, int64_t rows, int64_t inner,
                           int64_t outputs, bool turned, bool wide, void* y) {
  if (wide) {
    multiply(x, w, bias, rows, inner, outputs, turned, static_cast<float*>(y));
  } else {
    multiply(x, w, bias, rows, inner, outputs, turned, static_cast<bf16*>(y));
  }
}
void flowrun_multiply_f32(const float* x, const float* w, const float* bias, int64_t rows, int64_t inner,
                          int64_t outputs, bool turned, bool, void* y) {
  multiply(x, w, bias, rows, inner, outputs, turned, static_cast<float*>(y));
}

void flowrun_shrink_bf16(const bf16* x, int64_t stride, const float* a, int64_t rows, int64_t inner, int64_t rank,
                         float* low) {
  shrink(x, stride, a, rows, inner, rank, low);
}
void flowrun_shrink_f32(const float* x, int64_t stride, const float* a, int64_t rows, int64_t inner, int64_t rank,
                        float* low) {
  shrink(x, stride, a, rows, inner, rank, low);
}

void flowrun_expand_bf16(const float* low, const float* b, int64_t rows, int64_t rank, int64_t width, float scale,
                         bf16* out, int64_t stride) {
  expand(low, b, rows, rank, width, scale, out, stride);
}
void flowrun_expand_f32(const float* low, const float* b, int64_t rows, int64_t rank, int64_t width, float scale,
                        float* out, int64_t stride) {
  expand(low, b, rows, rank, width, scale, out, stride);
}

void flowrun_outer_bf16(const float* low, const bf16* x, int64_t stride, int64_t rows, int64_t rank, int64_t width,
                        float scale, float* to) {
  outer(low, x, stride, rows, rank, width, scale, to);
}
void flowrun_outer_f32(const float* low, const float* x, int64_t stride, int64_t rows, int64_t rank, int64_t width,
                       float scale, float* to) {
  outer(low, x, stride, rows, rank, width, scale, to);
}
}
#else
// Never called: flowrun_has_bf16_products() says no.
extern "C" {
void flowrun_multiply_bf16() {}
void flowrun_multiply_f32() {}
void flowrun_shrink_bf16() {}
void flowrun_shrink_f32() {}
void flowrun_expand_bf16() {}
void flowrun_expand_f32() {}
void flowrun_outer_bf16() {}
void flowrun_outer_f32() {}
}
#endif
