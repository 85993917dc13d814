// Products of a frozen matrix with many rows, and of the narrow matrices of an adapter, for passes that train.
//
// What comes out of a row depends on that row alone, however many others there are and wherever it stands: every
// number is summed over the inner dimension in one order. libtorch's products of bf16 round by their shape, and a
// reference that was scored in other company than it is trained in would be another reference.
//
// Plain pointers come in; products.rs beside this file has checked shapes and types.

#include "tiles.h"

#if defined(__x86_64__)
namespace {

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
