// What a pass without gradients computes on a CPU between libtorch's operations, or instead of them:
// products with few rows, norms, rotations, gates, the attention of a decode step. Each reads bf16 or
// float32, computes in float32 and rounds once. Rows are shared by libtorch's own OpenMP threads.
//
// Plain pointers come in; cpu.rs beside this file has checked shapes and types.

#include "attention.h"

extern "C" bool flowrun_has_bf16_products();

namespace {

template <typename T>
inline __attribute__((always_inline)) void norm_row(float* x, const T* add, const float* weight, float eps, T* out,
                                                    int64_t width) {
  // In a loop of its own, so that the sum has one order and a norm that is computed again the same bits.
  if (add) {
    for (int64_t i = 0; i < width; i++) x[i] += load(add[i]);
  }
  float sum = 0;
  for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
  float scale = 1.0f / std::sqrt(sum / float(width) + eps);
  for (int64_t i = 0; i < width; i++) store(out[i], x[i] * scale * weight[i]);
}
WIDE void norm_row_bf16(float* x, const bf16* add, const float* w, float eps, bf16* out, int64_t width) {
  norm_row(x, add, w, eps, out, width);
}
WIDE void norm_row_f32(float* x, const float* add, const float* w, float eps, float* out, int64_t width) {
  norm_row(x, add, w, eps, out, width);
}

// Heads of one token, normed where the model norms queries and keys, then turned in place.
template <typename T>
inline __attribute__((always_inline)) void turn_head(T* x, const float* weight, float eps, const T* cos, const T* sin,
                                                     int64_t dims, int64_t width) {
  float wide[1024];
  for (int64_t i = 0; i < width; i++) wide[i] = load(x[i]);
  if (weight) {
    float sum = 0;
    for (int64_t i = 0; i < width; i++) sum += wide[i] * wide[i];
    float scale = 1.0f / std::sqrt(sum / float(width) + eps);
    for (int64_t i = 0; i < width; i++) wide[i] *= scale * weight[i];
  }
  int64_t half = dims / 2;
  if (cos) {
    for (int64_t i = 0; i < half; i++) {
      float a = wide[i], b = wide[i + half];
      // The sine's first half comes negated.
      wide[i] = a * load(cos[i]) + b * load(sin[i]);
      wide[i + half] = b * load(cos[i + half]) + a * load(sin[i + half]);
    }
  }
  for (int64_t i = 0; i < width; i++) store(x[i], wide[i]);
}
WIDE void turn_head_bf16(bf16* x, const float* w, float eps, const bf16* cos, const bf16* sin, int64_t dims,
                         int64_t width) {
  turn_head(x, w, eps, cos, sin, dims, width);
}
WIDE void turn_head_f32(float* x, const float* w, float eps, const float* cos, const float* sin, int64_t dims,
                        int64_t width) {
  turn_head(x, w, eps, cos, sin, dims, width);
}

template <typename T>
inline __attribute__((always_inline)) void gate_row(const T* gate_up, T* out, int64_t width, bool gelu) {
  const T* up = gate_up + width;
  if (gelu) {
    for (int64_t i = 0; i < width; i++) {
      float x = load(gate_up[i]);
      float y = 0.7978845608f * (x + 0.044715f * x * x * x);
      // tanh(y) by way of e^-2|y|
      float e = exp_neg(-2.0f * std::fabs(y));
      float t = std::copysign((1.0f - e) / (1.0f + e), y);
      store(out[i], 0.5f * x * (1.0f + t) * load(up[i]));
    }
  } else {
    for (int64_t i = 0; i < width; i++) {
      float x = load(gate_up[i]);
      float e = exp_neg(-std::fabs(x));
      float sigmoid = (x >= 0 ? 1.0f : e) / (1.0f + e);
      store(out[i], x * sigmoid * load(up[i]));
    }
  }
}
WIDE void gate_row_bf16(const bf16* in, bf16* out, int64_t width, bool gelu) { gate_row(in, out, width, gelu); }
WIDE void gate_row_f32(const float* in, float* out, int64_t width, bool gelu) { gate_row(in, out, width, gelu); }

// From products of queries and keys to the shares of the values.
WIDE void softmax(float* s, int64_t count, Heads h) {
  for (int64_t j = 0; j < count; j++) s[j] *= h.scale;
  if (h.softcap > 0) {
    for (int64_t j = 0; j < count; j++) s[j] = h.softcap * std::tanh(s[j] / h.softcap);
  }
  float largest = s[0], total = 0;
  for (int64_t j = 1; j < count; j++) largest = s[j] > largest ? s[j] : largest;
  for (int64_t j = 0; j < count; j++) {
    s[j] = exp_neg(s[j] - largest);
    total += s[j];
  }
  float share = 1.0f / total;
  for (int64_t j = 0; j < count; j++) s[j] *= share;
}

// Keys and values of one kv head, `stride` apart.
template <typename T>
struct Span {
  const T *keys, *values;
  int64_t stride, count;
};

// Queries of one kv head of one token over spans with `count` keys together.
template <typename T>
inline __attribute__((always_inline)) void attend_head(const T* q, const Span<T>* spans, int64_t parts, int64_t count,
                                                       Heads h, float* scores, T* out) {
  float queries[16 * 256], sums[16 * 256], row[256];
  for (int64_t i = 0; i < h.group * h.dims; i++) {
    queries[i] = load(q[i]);
    sums[i] = 0;
  }
  float* score = scores;
  for (const Span<T>* span = spans; span < spans + parts; span++) {
    for (int64_t j = 0; j < span->count; j++, score++) {
      const T* key = span->keys + j * span->stride;
      for (int64_t d = 0; d < h.dims; d++) row[d] = load(key[d]);
      for (int64_t g = 0; g < h.group; g++) {
        float dot = 0;
        for (int64_t d = 0; d < h.dims; d++) dot += queries[g * h.dims + d] * row[d];
        score[g * count] = dot;
      }
    }
  }
  for (int64_t g = 0; g < h.group; g++) softmax(scores + g * count, count, h);
  score = scores;
  for (const Span<T>* span = spans; span < spans + parts; span++) {
    for (int64_t j = 0; j < span->count; j++, score++) {
      const T* value = span->values + j * span->stride;
      for (int64_t d = 0; d < h.dims; d++) row[d] = load(value[d]);
      for (int64_t g = 0; g < h.group; g++) {
        for (int64_t d = 0; d < h.dims; d++) sums[g * h.dims + d] += score[g * count] * row[d];
      }
    }
  }
  for (int64_t i = 0; i < h.group * h.dims; i++) store(out[i], sums[i]);
}
WIDE void attend_head_bf16(const bf16* q, const Span<bf16>* spans, int64_t parts, int64_t count, Heads h,
                           float* scores, bf16* out) {
  attend_head(q, spans, parts, count, h, scores, out);
}
WIDE void attend_head_f32(const float* q, const Span<float>* spans, int64_t parts, int64_t count, Heads h,
                          float* scores, float* out) {
  attend_head(q, spans, parts, count, h, scores, out);
}

// Numbers that are summed at a time when a token is drawn.
constexpr int64_t BLOCK = 512;

// What a token weighs whose logit is this far below the largest; a token without probability weighs nothing.
inline float weight(float below) { return below < -87.0f ? 0.0f : exp_neg(below); }

struct Drawn {
  int64_t token;
  float logprob;
};

// One token by inverse of the cumulative distribution at `temperature`, the first of the largest at 0; its
// log-probability is at temperature 1.
WIDE Drawn draw_row(const float* logits, int64_t count, float temperature, float uniform, float* sums) {
  float largest = logits[0];
  for (int64_t i = 1; i < count; i++) largest = logits[i] > largest ? logits[i] : largest;
  int64_t blocks = (count + BLOCK - 1) / BLOCK;
  double all = 0, total = 0;
  // Not infinite: nothing times it has to stay nothing.
  float heat = temperature > 0 ? std::min(1.0f / temperature, 1e30f) : 1.0f;
  for (int64_t b = 0; b < blocks; b++) {
    const float* block = logits + b * BLOCK;
    int64_t here = std::min(BLOCK, count - b * BLOCK);
    float sum = 0;
    for (int64_t i = 0; i < here; i++) sum += weight(block[i] - largest);
    all += sum;
    if (heat != 1.0f) {
      sum = 0;
      for (int64_t i = 0; i < here; i++) sum += weight((block[i] - largest) * heat);
    }
    sums[b] = sum;
    total += sum;
  }
  int64_t token = 0;
  if (temperature > 0) {
    double target = std::min(double(uniform), 1.0 - 1e-7) * total, before = 0;
    int64_t b = 0, last = 0;
    for (; b + 1 < blocks && before + sums[b] <= target; b++) before += sums[b];
    for (int64_t i = b * BLOCK; i < std::min(count, (b + 1) * BLOCK); i++) {
      float w = weight((logits[i] - largest) * heat);
      if (w > 0) last = i;
      before += w;
      if (before > target) break;
    }
    token = last;
  } else {
    while (token + 1 < count && !(logits[token] == largest)) token++;
  }
  return Drawn{token, float(logits[token] - largest - std::log(all))};
}

template <typename T, typename Row>
void norm(float* x, const T* add, const float* weight, float eps, T* out, int64_t rows, int64_t width, Row row) {
#pragma omp parallel for if (rows * width >= SHARED_FROM)
  for (int64_t r = 0; r < rows; r++) {
    row(x + r * width, add ? add + r * width : nullptr, weight, eps, out + r * width, width);
  }
}

template <typename T, typename Head>
void turn(T* x, int64_t rows, int64_t stride, int64_t heads, int64_t queries, int64_t width, const float* q_norm,
          const float* k_norm, float eps, const T* cos, const T* sin, int64_t dims, Head head) {
#pragma omp parallel for if (rows * heads * width >= SHARED_FROM)
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t h = 0; h < heads; h++) {
      head(x + r * stride + h * width, h < queries ? q_norm : k_norm, eps, cos ? cos + r * dims : nullptr,
           sin ? sin + r * dims : nullptr, dims, width);
    }
  }
}

template <typename T, typename Row>
void gate(const T* gate_up, T* out, int64_t rows, int64_t width, bool gelu, Row row) {
#pragma omp parallel for if (rows * width >= SHARED_FROM / 2)
  for (int64_t r = 0; r < rows; r++) row(gate_up + r * 2 * width, out + r * width, width, gelu);
}

#if defined(__x86_64__)
// 32 numbers of each of 4 rows of weights and ROWS rows of x, multiplied and added to the partial sums.
template <int ROWS>
BF16 inline __attribute__((always_inline)) void step(const bf16* x, const bf16* w, int64_t inner, __mmask32 mask,
                                                     __m512 (&part)[16]) {
  __m512bh weights[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) weights[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + j * inner);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * inner);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) part[4 * j + r] = _mm512_dpbf16_ps(part[4 * j + r], row, weights[j]);
  }
}

// The rows of a tile to their places.
BF16 inline __attribute__((always_inline)) void rows_out(__m512 sums, int rows, float* y, int64_t outputs) {
  float flat[16];
  _mm512_storeu_ps(flat, sums);
  for (int r = 0; r < rows; r++) std::memcpy(y + r * outputs, flat + 4 * r, 16);
}
BF16 inline __attribute__((always_inline)) void rows_out(__m512 sums, int rows, bf16* y, int64_t outputs) {
  bf16 flat[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(flat), (__m256i)_mm512_cvtneps_pbh(sums));
  for (int r = 0; r < rows; r++) std::memcpy(y + r * outputs, flat + 4 * r, 8);
}

// ROWS rows by 4 outputs: every product along the inner dimension, summed across at the end. FETCH rows
// of weights from `ahead` on are brought near meanwhile, evenly: in one burst they would be waited for.
template <int ROWS, int FETCH, typename Out>
BF16 inline void tile(const bf16* x, const bf16* w, const bf16* ahead, __m512 bias, int64_t inner, Out* y,
                      int64_t outputs) {
  __m512 part[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) part[i] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= inner; k += 32) {
#pragma GCC unroll 4
    for (int i = 0; i < FETCH; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + FETCH * k + 32 * i), _MM_HINT_T0);
    }
    step<ROWS>(x + k, w + k, inner, ~__mmask32(0), part);
  }
  if (k < inner) step<ROWS>(x + k, w + k, inner, (__mmask32(1) << (inner - k)) - 1, part);
  rows_out(_mm512_add_ps(sums_of_16(part), bias), ROWS, y, outputs);
}

// All rows by 4 outputs, while the weights of the next 4 are fetched.
template <typename Out>
BF16 void stripe(const bf16* x, const bf16* w, const float* biases, int64_t rows, int64_t inner, Out* y,
                 int64_t outputs) {
  __m512 bias = biases ? _mm512_broadcast_f32x4(_mm_loadu_ps(biases)) : _mm512_setzero_ps();
  const bf16* ahead = w + 4 * inner;
  int64_t r = 0;
  if (rows >= 16) {
    for (; r < 16; r += 4, ahead += inner) tile<4, 1>(x + r * inner, w, ahead, bias, inner, y + r * outputs, outputs);
  } else if (rows >= 8) {
    for (; r < 8; r += 4, ahead += 2 * inner) {
      tile<4, 2>(x + r * inner, w, ahead, bias, inner, y + r * outputs, outputs);
    }
  } else if (rows >= 4) {
    tile<4, 4>(x, w, ahead, bias, inner, y, outputs);
    r = 4;
  } else {
    switch (rows) {
      case 3: return tile<3, 4>(x, w, ahead, bias, inner, y, outputs);
      case 2: return tile<2, 4>(x, w, ahead, bias, inner, y, outputs);
      case 1: return tile<1, 4>(x, w, ahead, bias, inner, y, outputs);
    }
  }
  for (; r + 4 <= rows; r += 4) tile<4, 0>(x + r * inner, w, w, bias, inner, y + r * outputs, outputs);
  switch (rows - r) {
    case 3: return tile<3, 0>(x + r * inner, w, w, bias, inner, y + r * outputs, outputs);
    case 2: return tile<2, 0>(x + r * inner, w, w, bias, inner, y + r * outputs, outputs);
    case 1: return tile<1, 0>(x + r * inner, w, w, bias, inner, y + r * outputs, outputs);
  }
}

// All rows of x by 4 rows of weights in float32.
BF16 void stripe_f32(const float* x, const float* w, const float* bias, int64_t rows, int64_t inner, float* y,
                     int64_t outputs) {
  __m512 add = bias ? _mm512_broadcast_f32x4(_mm_loadu_ps(bias)) : _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; r += 4) {
    const float* row = x + r * inner;
    int64_t here = std::min<int64_t>(4, rows - r);
    __m512 sums;
    switch (here) {
      case 1: sums = wide_tile<1>(row, inner, w, 3, inner); break;
      case 2: sums = wide_tile<2>(row, inner, w, 3, inner); break;
      case 3: sums = wide_tile<3>(row, inner, w, 3, inner); break;
      default: sums = wide_tile<4>(row, inner, w, 3, inner);
    }
    rows_out(_mm512_add_ps(sums, add), int(here), y + r * outputs, outputs);
  }
}
void product_f32(const float* x, const float* w, const float* bias, int64_t rows, int64_t inner, int64_t outputs,
                 float* y) {
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < outputs; o += 4) {
    stripe_f32(x, w + o * inner, bias ? bias + o : nullptr, rows, inner, y + o, outputs);
  }
}

// An adapter's two matrices at a module whose outputs begin at `first`.
struct Lora {
  const float *a, *b;
  int64_t rank, first, width;
};

// Rows that one thread adapts at a time, and the largest rank.
constexpr int64_t ADAPTED = 32, MAX_RANK = 256;

// low = x A^T, `rank` numbers a row.
template <int ROWS, typename T>
BF16 void shrink(const T* x, int64_t inner, const Lora& lora, float* low) {
  float sums[16];
  for (int64_t j = 0; j < lora.rank; j += 4) {
    _mm512_storeu_ps(sums, wide_tile<ROWS>(x, inner, lora.a + j * inner, 3, inner));
    for (int r = 0; r < ROWS; r++) std::memcpy(low + r * lora.rank + j, sums + 4 * r, 16);
  }
}

// Adds scale * low B^T to all rows, sixteen outputs at a time: their rows of B are turned once, so that nothing is
// summed across.
template <typename T>
BF16 void expand(const float* low, int64_t rows, const Lora& lora, float scale, T* out, int64_t outputs) {
  float turned[MAX_RANK * 16];
  for (int64_t o = 0; o < lora.width; o += 16) {
    int64_t here = std::min<int64_t>(16, lora.width - o);
    for (int64_t j = 0; j < lora.rank; j++) {
      for (int64_t i = 0; i < 16; i++) turned[16 * j + i] = i < here ? scale * lora.b[(o + i) * lora.rank + j] : 0.0f;
    }
    __mmask16 mask = __mmask16((1 << here) - 1);
    for (int64_t r = 0; r < rows; r++) {
      T* to = out + r * outputs + lora.first + o;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t j = 0; j < lora.rank; j++) {
        sum = _mm512_fmadd_ps(_mm512_set1_ps(low[r * lora.rank + j]), _mm512_loadu_ps(turned + 16 * j), sum);
      }
      narrowed(to, mask, _mm512_add_ps(widened(to, mask), sum));
    }
  }
}

// Adds what adapters change to at most ADAPTED rows.
template <typename T>
BF16 void adapt(const T* x, int64_t rows, int64_t inner, const Lora* loras, int64_t count, float scale, T* out,
                int64_t outputs) {
  float low[ADAPTED * MAX_RANK];
  for (const Lora* lora = loras; lora < loras + count; lora++) {
    for (int64_t r = 0; r < rows; r += 4) {
      const T* row = x + r * inner;
      float* to = low + r * lora->rank;
      switch (rows - r) {
        case 1: shrink<1>(row, inner, *lora, to); break;
        case 2: shrink<2>(row, inner, *lora, to); break;
        case 3: shrink<3>(row, inner, *lora, to); break;
        default: shrink<4>(row, inner, *lora, to);
      }
    }
    expand(low, rows, *lora, scale, out, outputs);
  }
}

template <typename T>
void adapt_rows(const T* x, int64_t rows, int64_t inner, const Lora* loras, int64_t count, float scale, T* out,
                int64_t outputs) {
  int64_t threads = omp_get_max_threads();
  int64_t each = std::min(ADAPTED, ((rows + threads - 1) / threads + 3) / 4 * 4);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r += each) {
    adapt(x + r * inner, std::min(each, rows - r), inner, loras, count, scale, out + r * outputs, outputs);
  }
}

// Lane n is the product of the query with key n, or with the last one, over dims that are a multiple of 32.
BF16 inline __m512 scores_of_16(const bf16* q, const bf16* keys, int64_t stride, int64_t last, int64_t dims) {
  __m512 part[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) part[i] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dims; d += 32) {
    __m512bh query = (__m512bh)_mm512_loadu_si512(q + d);
#pragma GCC unroll 16
    for (int n = 0; n < 16; n++) {
      __m512bh key = (__m512bh)_mm512_loadu_si512(keys + (n < last ? n : last) * stride + d);
      part[4 * (n % 4) + n / 4] = _mm512_dpbf16_ps(part[4 * (n % 4) + n / 4], query, key);
    }
  }
  return sums_of_16(part);
}

// Adds up GROUP weighted sums of 64 numbers of each value.
template <int GROUP>
BF16 inline void weighted_64(const float* scores, int64_t row, const Span<bf16>* spans, int64_t parts, int64_t first,
                             bf16* out, int64_t dims) {
  __m512 sums[4 * GROUP];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * GROUP; i++) sums[i] = _mm512_setzero_ps();
  for (const Span<bf16>* span = spans; span < spans + parts; scores += span->count, span++) {
    const bf16* values = span->values + first;
    for (int64_t j = 0; j < span->count; j++) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + j * span->stride + 16 * part));
        __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; g++) {
          sums[4 * g + part] = _mm512_fmadd_ps(_mm512_set1_ps(scores[g * row + j]), value, sums[4 * g + part]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4 * GROUP; i++) {
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums[i]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i / 4) * dims + first + 16 * (i % 4)), rounded);
  }
}

// attend_head for dims that are a multiple of 64. A query's scores have room for 16 more than `count`.
BF16 void attend_head_products(const bf16* q, const Span<bf16>* spans, int64_t parts, int64_t count, Heads h,
                               float* scores, bf16* out) {
  int64_t row = count + 16;
  for (int64_t g = 0; g < h.group; g++) {
    float* score = scores + g * row;
    for (const Span<bf16>* span = spans; span < spans + parts; score += span->count, span++) {
      for (int64_t j = 0; j < span->count; j += 16) {
        const bf16* keys = span->keys + j * span->stride;
        int64_t last = std::min<int64_t>(15, span->count - 1 - j);
        _mm512_storeu_ps(score + j, scores_of_16(q + g * h.dims, keys, span->stride, last, h.dims));
      }
    }
    softmax(scores + g * row, count, h);
  }
  for (int64_t d = 0; d < h.dims; d += 64) {
    int64_t g = 0;
    for (; g + 4 <= h.group; g += 4) {
      weighted_64<4>(scores + g * row, row, spans, parts, d, out + g * h.dims, h.dims);
    }
    switch (h.group - g) {
      case 3: weighted_64<3>(scores + g * row, row, spans, parts, d, out + g * h.dims, h.dims); break;
      case 2: weighted_64<2>(scores + g * row, row, spans, parts, d, out + g * h.dims, h.dims); break;
      case 1: weighted_64<1>(scores + g * row, row, spans, parts, d, out + g * h.dims, h.dims); break;
    }
  }
}

template <typename Out>
void product(const bf16* x, const bf16* w, const float* bias, int64_t rows, int64_t inner, int64_t outputs, Out* y) {
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < outputs / 4; o++) {
    stripe(x, w + 4 * o * inner, bias ? bias + 4 * o : nullptr, rows, inner, y + 4 * o, outputs);
  }
}
#endif

template <typename T, typename Head>
void decode(const T* q, const T* k, const T* v, int64_t stride, T* keys, T* values, int64_t slot, int64_t kv_heads,
            const int64_t* positions, int64_t window, int64_t rows, Heads h, T* out, Head head) {
  int64_t across = kv_heads * h.dims, longest = 0;
  for (int64_t r = 0; r < rows; r++) longest = std::max(longest, positions[r] + 1);
#pragma omp parallel
  {
    std::vector<float> scores(h.group * (longest + 16));
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < rows * kv_heads; i++) {
      int64_t r = i / kv_heads, n = i % kv_heads, end = positions[r] + 1;
      T* key = keys + r * slot + n * h.dims;
      T* value = values + r * slot + n * h.dims;
      std::memcpy(key + positions[r] * across, k + r * stride + n * h.dims, h.dims * sizeof(T));
      std::memcpy(value + positions[r] * across, v + r * stride + n * h.dims, h.dims * sizeof(T));
      int64_t first = std::max<int64_t>(0, end - window);
      Span<T> span{key + first * across, value + first * across, across, end - first};
      head(q + r * stride + n * h.group * h.dims, &span, 1, span.count, h, scores.data(),
           out + (r * kv_heads + n) * h.group * h.dims);
    }
  }
}

// Queries of a stretch that are worth tiles, and tokens that a thread takes at a time.
constexpr int64_t TILED_FROM = 8, CHUNK = 256;

template <typename T, typename Head>
void attend(const T* q, int64_t stride, const Source* sources, const Stretch* stretches, int64_t count,
            const Rows* rows, int64_t window, int64_t kv_heads, Heads h, T* out, Head head) {
  struct Token {
    const Rows* rows;
    int64_t spans, seen, at;
  };
  std::vector<Token> tokens;
  int64_t longest = 0, most = 0, token = 0;
#if defined(__x86_64__)
  struct Part {
    Chunk chunk;
    int64_t token;
  };
  std::vector<Part> parts;
  bool tiled = flowrun_has_bf16_products() && h.softcap == 0 && h.dims % PER_WORD<T> == 0;
#endif
  for (const Stretch* s = stretches; s < stretches + count; rows += s->spans, token += s->tokens, s++) {
    int64_t all = 0;
    for (int64_t i = 0; i < s->spans; i++) all += rows[i].count;
#if defined(__x86_64__)
    if (tiled && s->tokens * h.group >= TILED_FROM) {
      for (int64_t t = 0; t < s->tokens; t += CHUNK) {
        Chunk chunk{rows, s->spans, all, s->tokens, t, std::min(CHUNK, s->tokens - t)};
        parts.push_back(Part{chunk, token + t});
      }
      continue;
    }
#endif
    for (int64_t t = 1; t <= s->tokens; t++) tokens.push_back(Token{rows, s->spans, all - s->tokens + t, token + t - 1});
    longest = std::max(longest, all);
    most = std::max(most, s->spans);
  }
  int64_t all = int64_t(tokens.size());
#pragma omp parallel
  {
#if defined(__x86_64__)
    Seat<T> seat;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < int64_t(parts.size()) * kv_heads; i++) {
      const Part& part = parts[i / kv_heads];
      attend_chunk(q + part.token * stride, stride, sources, part.chunk, window, i % kv_heads, kv_heads, h,
                   out + part.token * kv_heads * h.group * h.dims, seat);
    }
#endif
    std::vector<float> scores(h.group * (longest + 16));
    std::vector<Span<T>> spans(most);
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < all * kv_heads; i++) {
      // Neighbours share their keys.
      int64_t n = i / all, t = i % all;
      const Token& token = tokens[t];
      int64_t hidden = std::max<int64_t>(0, token.seen - window), left = token.seen - hidden, used = 0;
      for (int64_t r = 0, skip = hidden, rest = left; r < token.spans && rest > 0; r++) {
        const Rows& part = token.rows[r];
        int64_t cut = std::min(skip, part.count), take = std::min(part.count - cut, rest);
        skip -= cut;
        rest -= take;
        if (take == 0) continue;
        const Source& source = sources[part.source];
        int64_t at = (part.first + cut) * source.stride + n * h.dims;
        spans[used++] = Span<T>{static_cast<const T*>(source.keys) + at, static_cast<const T*>(source.values) + at,
                                source.stride, take};
      }
      head(q + token.at * stride + n * h.group * h.dims, spans.data(), used, left, h, scores.data(),
           out + (token.at * kv_heads + n) * h.group * h.dims);
    }
  }
}

}  // namespace

extern "C" {

bool flowrun_has_bf16_products() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

static auto head_of(int64_t dims) {
#if defined(__x86_64__)
  if (flowrun_has_bf16_products() && dims % 64 == 0) return attend_head_products;
#endif
  (void)dims;
  return attend_head_bf16;
}

void flowrun_product_f32(const float* x, const float* w, const float* bias, int64_t rows, int64_t inner,
                         int64_t outputs, float* y) {
#if defined(__x86_64__)
  product_f32(x, w, bias, rows, inner, outputs, y);
#else
  (void)x, (void)w, (void)bias, (void)rows, (void)inner, (void)outputs, (void)y;
#endif
}

void flowrun_product_bf16(const bf16* x, const bf16* w, const float* bias, int64_t rows, int64_t inner,
                          int64_t outputs, void* y, bool wide) {
#if defined(__x86_64__)
  if (wide) {
    product(x, w, bias, rows, inner, outputs, static_cast<float*>(y));
  } else {
    product(x, w, bias, rows, inner, outputs, static_cast<bf16*>(y));
  }
#endif
}

void flowrun_norm_bf16(float* x, const bf16* add, const float* weight, float eps, bf16* out, int64_t rows,
                       int64_t width) {
  norm(x, add, weight, eps, out, rows, width, norm_row_bf16);
}
void flowrun_norm_f32(float* x, const float* add, const float* weight, float eps, float* out, int64_t rows,
                      int64_t width) {
  norm(x, add, weight, eps, out, rows, width, norm_row_f32);
}

void flowrun_turn_bf16(bf16* x, int64_t rows, int64_t stride, int64_t heads, int64_t queries, int64_t width,
                       const float* q_norm, const float* k_norm, float eps, const bf16* cos, const bf16* sin,
                       int64_t dims) {
  turn(x, rows, stride, heads, queries, width, q_norm, k_norm, eps, cos, sin, dims, turn_head_bf16);
}
void flowrun_turn_f32(float* x, int64_t rows, int64_t stride, int64_t heads, int64_t queries, int64_t width,
                      const float* q_norm, const float* k_norm, float eps, const float* cos, const float* sin,
                      int64_t dims) {
  turn(x, rows, stride, heads, queries, width, q_norm, k_norm, eps, cos, sin, dims, turn_head_f32);
}

void flowrun_gate_bf16(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, bool gelu) {
  gate(gate_up, out, rows, width, gelu, gate_row_bf16);
}
void flowrun_gate_f32(const float* gate_up, float* out, int64_t rows, int64_t width, bool gelu) {
  gate(gate_up, out, rows, width, gelu, gate_row_f32);
}

void flowrun_decode_bf16(const bf16* q, const bf16* k, const bf16* v, int64_t stride, bf16* keys, bf16* values,
                         int64_t slot, int64_t kv_heads, const int64_t* positions, int64_t window, int64_t rows,
                         int64_t group, int64_t dims, float scale, float softcap, bf16* out) {
  auto head = head_of(dims);
  decode(q, k, v, stride, keys, values, slot, kv_heads, positions, window, rows, Heads{group, dims, scale, softcap},
         out, head);
}
void flowrun_decode_f32(const float* q, const float* k, const float* v, int64_t stride, float* keys, float* values,
                        int64_t slot, int64_t kv_heads, const int64_t* positions, int64_t window, int64_t rows,
                        int64_t group, int64_t dims, float scale, float softcap, float* out) {
  decode(q, k, v, stride, keys, values, slot, kv_heads, positions, window, rows, Heads{group, dims, scale, softcap},
         out, attend_head_f32);
}

void flowrun_attend_bf16(const bf16* q, int64_t stride, const Source* sources, const Stretch* stretches, int64_t count,
                         const Rows* rows, int64_t window, int64_t kv_heads, int64_t group, int64_t dims, float scale,
                         float softcap, bf16* out) {
  attend(q, stride, sources, stretches, count, rows, window, kv_heads, Heads{group, dims, scale, softcap}, out,
         head_of(dims));
}
void flowrun_attend_f32(const float* q, int64_t stride, const Source* sources, const Stretch* stretches, int64_t count,
                        const Rows* rows, int64_t window, int64_t kv_heads, int64_t group, int64_t dims, float scale,
                        float softcap, float* out) {
  attend(q, stride, sources, stretches, count, rows, window, kv_heads, Heads{group, dims, scale, softcap}, out,
         attend_head_f32);
}

void flowrun_draw(const float* logits, int64_t rows, int64_t count, const float* temperatures, const float* uniforms,
                  int64_t* tokens, float* logprobs) {
#pragma omp parallel
  {
    std::vector<float> sums((count + BLOCK - 1) / BLOCK);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < rows; r++) {
      Drawn drawn = draw_row(logits + r * count, count, temperatures[r], uniforms[r], sums.data());
      tokens[r] = drawn.token;
      logprobs[r] = drawn.logprob;
    }
  }
}

#if defined(__x86_64__)
void flowrun_adapt_bf16(const bf16* x, int64_t rows, int64_t inner, const Lora* loras, int64_t count, float scale,
                        bf16* out, int64_t outputs) {
  adapt_rows(x, rows, inner, loras, count, scale, out, outputs);
}
void flowrun_adapt_f32(const float* x, int64_t rows, int64_t inner, const Lora* loras, int64_t count, float scale,
                       float* out, int64_t outputs) {
  adapt_rows(x, rows, inner, loras, count, scale, out, outputs);
}
#else
// Never called: flowrun_has_bf16_products() says no.
void flowrun_adapt_bf16() {}
void flowrun_adapt_f32() {}
#endif
}
