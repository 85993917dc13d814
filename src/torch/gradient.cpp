// Backward of what a pass computes between its products, on a CPU: norms, rotations, gates, attention, the head's
// softmax. Each reads bf16 or float32 and computes in float32.
//
// Plain pointers come in; gradient.rs beside this file has checked shapes and types.

#include "tiles.h"

namespace {

// y = x / rms(x) * weight: dx += what dy does to x.
WIDE void norm_row(const float* x, const float* weight, float eps, const float* dy, float* dx, int64_t width) {
  float squares = 0, along = 0;
  for (int64_t i = 0; i < width; i++) {
    squares += x[i] * x[i];
    along += dy[i] * weight[i] * x[i];
  }
  float scale = 1.0f / std::sqrt(squares / float(width) + eps);
  float back = scale * scale * scale * along / float(width);
  for (int64_t i = 0; i < width; i++) dx[i] += scale * dy[i] * weight[i] - back * x[i];
}

struct Act {
  float value, slope;
};
inline Act silu(float x) {
  float e = exp_neg(-std::fabs(x));
  float sigmoid = (x >= 0 ? 1.0f : e) / (1.0f + e);
  return Act{x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
}
inline Act gelu_tanh(float x) {
  float y = 0.7978845608f * (x + 0.044715f * x * x * x);
  float e = exp_neg(-2.0f * std::fabs(y));
  float t = std::copysign((1.0f - e) / (1.0f + e), y);
  float inner = 0.7978845608f * (1.0f + 0.134145f * x * x);
  return Act{0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner};
}

// act(gate) * up: the gradients of both halves.
template <typename T, typename F>
inline __attribute__((always_inline)) void gate_row(const T* __restrict gate, const T* __restrict up,
                                                    const float* __restrict dy, T* __restrict d_gate,
                                                    T* __restrict d_up, int64_t width, F act) {
  for (int64_t i = 0; i < width; i++) {
    Act a = act(load(gate[i]));
    store(d_gate[i], dy[i] * load(up[i]) * a.slope);
    store(d_up[i], dy[i] * a.value);
  }
}
WIDE void gate_row_bf16(const bf16* in, const float* dy, bf16* d, int64_t width, bool gelu) {
  if (gelu) {
    gate_row(in, in + width, dy, d, d + width, width, [](float x) { return gelu_tanh(x); });
  } else {
    gate_row(in, in + width, dy, d, d + width, width, [](float x) { return silu(x); });
  }
}
WIDE void gate_row_f32(const float* in, const float* dy, float* d, int64_t width, bool gelu) {
  if (gelu) {
    gate_row(in, in + width, dy, d, d + width, width, [](float x) { return gelu_tanh(x); });
  } else {
    gate_row(in, in + width, dy, d, d + width, width, [](float x) { return silu(x); });
  }
}

// The gradient of a head that was normed, where there is a weight, and turned: from after to before. `x` is the head
// as it was projected.
template <typename T>
inline __attribute__((always_inline)) void turn_head(const T* x, const float* weight, float eps, const T* cos,
                                                     const T* sin, int64_t dims, int64_t width, const float* after,
                                                     T* before) {
  float d[256];
  for (int64_t i = 0; i < width; i++) d[i] = after[i];
  int64_t half = dims / 2;
  for (int64_t i = 0; i < half; i++) {
    float a = after[i], b = after[i + half];
    // The sine's first half comes negated.
    d[i] = a * load(cos[i]) + b * load(sin[i + half]);
    d[i + half] = b * load(cos[i + half]) + a * load(sin[i]);
  }
  if (weight) {
    float squares = 0, along = 0;
    for (int64_t i = 0; i < width; i++) {
      squares += load(x[i]) * load(x[i]);
      along += d[i] * weight[i] * load(x[i]);
    }
    float scale = 1.0f / std::sqrt(squares / float(width) + eps);
    float back = scale * scale * scale * along / float(width);
    for (int64_t i = 0; i < width; i++) d[i] = scale * d[i] * weight[i] - back * load(x[i]);
  }
  for (int64_t i = 0; i < width; i++) store(before[i], d[i]);
}
WIDE void turn_head_bf16(const bf16* x, const float* w, float eps, const bf16* cos, const bf16* sin, int64_t dims,
                         int64_t width, const float* after, bf16* before) {
  turn_head(x, w, eps, cos, sin, dims, width, after, before);
}
WIDE void turn_head_f32(const float* x, const float* w, float eps, const float* cos, const float* sin, int64_t dims,
                        int64_t width, const float* after, float* before) {
  turn_head(x, w, eps, cos, sin, dims, width, after, before);
}

// The log-probability of a target among logits, and its gradient by them.
template <typename T>
inline __attribute__((always_inline)) float target_row(const float* logits, int64_t target, int64_t count, T* d) {
  float largest = logits[0];
  for (int64_t i = 1; i < count; i++) largest = logits[i] > largest ? logits[i] : largest;
  double all = 0;
  for (int64_t b = 0; b < count; b += 512) {
    float sum = 0;
    int64_t end = std::min(count, b + 512);
    for (int64_t i = b; i < end; i++) sum += exp_neg(logits[i] - largest);
    all += sum;
  }
  if (d) {
    float share = float(1.0 / all);
    for (int64_t i = 0; i < count; i++) store(d[i], -share * exp_neg(logits[i] - largest));
    store(d[target], 1.0f - share * exp_neg(logits[target] - largest));
  }
  return float(logits[target] - largest - std::log(all));
}
WIDE float target_row_bf16(const float* logits, int64_t target, int64_t count, bf16* d) {
  return target_row(logits, target, count, d);
}
WIDE float target_row_f32(const float* logits, int64_t target, int64_t count, float* d) {
  return target_row(logits, target, count, d);
}

template <typename T, typename Row>
void gate(const T* gate_up, const float* dy, T* d, int64_t rows, int64_t width, bool gelu, Row row) {
#pragma omp parallel for if (rows * width >= SHARED_FROM / 2)
  for (int64_t r = 0; r < rows; r++) row(gate_up + r * 2 * width, dy + r * width, d + r * 2 * width, width, gelu);
}

template <typename T, typename Head>
void turn(const T* qkv, int64_t rows, int64_t heads, int64_t queries, int64_t keys, int64_t width,
          const float* q_norm, const float* k_norm, float eps, const T* cos, const T* sin, int64_t dims,
          const float* after, T* before, Head head) {
#pragma omp parallel for if (rows * heads * width >= SHARED_FROM)
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t h = 0; h < heads; h++) {
      int64_t at = (r * heads + h) * width;
      bool turned = h < queries + keys;
      const float* weight = !turned ? nullptr : h < queries ? q_norm : k_norm;
      head(qkv + at, weight, eps, cos ? cos + r * dims : nullptr, sin ? sin + r * dims : nullptr, turned ? dims : 0,
           width, after + at, before + at);
    }
  }
}

template <typename T, typename Row>
void targets(const float* logits, const int64_t* targets, int64_t rows, int64_t count, float* log_probs, T* d,
             Row row) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t r = 0; r < rows; r++) {
    log_probs[r] = row(logits + r * count, targets[r], count, d ? d + r * count : nullptr);
  }
}

#if defined(__x86_64__)

// Stretches that share keys with each other and with no others: a prompt and its answers.
struct Tree {
  int64_t stretches, first, tokens;
};

// One query's row of a block: from products to shares and from the values' slopes to the products' slopes. The row's
// numbers of panel j are at 32 j `stride`; of them it sees those of `seen[j]`.
template <typename T>
BF16 void softmax_back(float* products, const float* slopes, const uint32_t* seen, int64_t panels, int64_t stride,
                       float scale, T* shares, T* back) {
  constexpr float NONE = -3.0e38f;
  __m512 largest = _mm512_set1_ps(NONE), factor = _mm512_set1_ps(scale);
  for (int64_t j = 0; j < panels; j++) {
    for (int half = 0; half < 2; half++) {
      __mmask16 mask = __mmask16(seen[j] >> (16 * half));
      largest = _mm512_mask_max_ps(largest, mask, largest, _mm512_loadu_ps(products + j * stride * PANEL + 16 * half));
    }
  }
  __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest)), total = _mm512_setzero_ps(), along = total;
  for (int64_t j = 0; j < panels; j++) {
    for (int half = 0; half < 2; half++) {
      int64_t at = j * stride * PANEL + 16 * half;
      __m512 power = exp_neg_16(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(products + at), most), factor));
      __m512 one = _mm512_maskz_mov_ps(__mmask16(seen[j] >> (16 * half)), power);
      _mm512_storeu_ps(products + at, one);
      total = _mm512_add_ps(total, one);
      along = _mm512_fmadd_ps(one, _mm512_loadu_ps(slopes + at), along);
    }
  }
  float sum = _mm512_reduce_add_ps(total);
  __m512 inverse = _mm512_set1_ps(1.0f / sum), mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) / sum);
  for (int64_t j = 0; j < panels; j++) {
    for (int half = 0; half < 2; half++) {
      int64_t at = j * stride * PANEL + 16 * half;
      __m512 one = _mm512_mul_ps(_mm512_loadu_ps(products + at), inverse);
      narrowed(shares + at, 0xffff, one);
      __m512 slope = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(slopes + at), mean), factor);
      narrowed(back + at, 0xffff, _mm512_mul_ps(one, slope));
    }
  }
}

// `rows` rows of `dims` numbers to columns `stride` long.
BF16 void turn_rows(const float* from, int64_t rows, int64_t dims, float* to, int64_t stride) {
  word turned[16 * PANEL];
  for (int64_t r = 0; r < rows; r += 16) {
    __mmask16 mask = first_of_16(rows - r);
    for (int64_t d = 0; d < dims; d += 16) {
      turn_16(reinterpret_cast<const word*>(from + r * dims + d), dims, rows - r, first_of_16(dims - d), turned);
      for (int64_t i = 0; i < std::min<int64_t>(16, dims - d); i++) {
        _mm512_mask_storeu_epi32(to + (d + i) * stride + r, mask, _mm512_loadu_si512(turned + i * PANEL));
      }
    }
  }
}
BF16 void turn_rows(const bf16* from, int64_t rows, int64_t dims, bf16* to, int64_t stride) {
  word turned[16 * PANEL];
  for (int64_t r = 0; r < rows; r += 16) {
    __mmask16 mask = first_of_16(rows - r);
    for (int64_t d = 0; d < dims; d += 32) {
      const word* words = reinterpret_cast<const word*>(from + r * dims + d);
      turn_16(words, dims / 2, rows - r, first_of_16((dims - d) / 2), turned);
      for (int64_t i = 0; i < std::min<int64_t>(16, (dims - d) / 2); i++) {
        __m512i both = _mm512_loadu_si512(turned + i * PANEL);
        bf16* at = to + (d + 2 * i) * stride + r;
        _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(both));
        _mm256_mask_storeu_epi16(at + stride, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
      }
    }
  }
}

// Keys and values of a kv head of a tree: as panels over the head's numbers, and the keys as panels over the keys too.
template <typename T>
struct Side {
  int64_t dims, depth, chunks, panels;
  std::vector<word> keys, values, by_key;

  int64_t size() const { return (depth + 16) * PANEL; }

  BF16 void pack(const T* key, const T* value, int64_t across, int64_t tokens, int64_t width) {
    dims = width, depth = dims / PER_WORD<T>, chunks = (dims + PANEL - 1) / PANEL, panels = (tokens + PANEL - 1) / PANEL;
    for (auto* part : {&keys, &values}) part->resize(panels * size());
    by_key.resize(panels * chunks * KEYS<T> * PANEL);
    std::vector<T> rows(PANEL * dims);
    for (int64_t p = 0; p < panels; p++) {
      int64_t here = std::min(PANEL, tokens - p * PANEL);
      const T* from = key + p * PANEL * across;
      pack_rows(reinterpret_cast<const word*>(from), across / PER_WORD<T>, here, depth, keys.data() + p * size());
      const word* last = reinterpret_cast<const word*>(value + p * PANEL * across);
      pack_rows(last, across / PER_WORD<T>, here, depth, values.data() + p * size());
      // Rows beyond the last token must not be read.
      std::memset(static_cast<void*>(rows.data()), 0, rows.size() * sizeof(T));
      for (int64_t t = 0; t < here; t++) std::memcpy(rows.data() + t * dims, from + t * across, dims * sizeof(T));
      for (int64_t c = 0; c < chunks; c++) {
        word* to = by_key.data() + (p * chunks + c) * KEYS<T> * PANEL;
        pack_columns(rows.data() + c * PANEL, dims, std::min(PANEL, dims - c * PANEL), KEYS<T>, to);
      }
    }
  }
};

// What a thread needs for a block of queries.
template <typename T>
struct Room {
  std::vector<T> query, out, query_turned, out_turned, shares, back;
  std::vector<float> products, slopes, d_query;
  std::vector<word> panel;
  std::vector<int64_t> panels;
  std::vector<uint32_t> seen;
};

// Where a stretch looks, in tokens of its tree.
struct Sight {
  const Rows* rows;
  int64_t spans, first, all, tokens, window;

  // Calls f(begin, end) for what the token `t` of the stretch sees.
  template <typename F>
  void each(int64_t t, F f) const {
    int64_t sees = all - tokens + t + 1, skip = std::max<int64_t>(0, sees - window), left = sees - skip;
    for (int64_t i = 0; i < spans && left > 0; i++) {
      int64_t cut = std::min(skip, rows[i].count), take = std::min(rows[i].count - cut, left);
      skip -= cut;
      left -= take;
      if (take > 0) f(rows[i].first - first + cut, rows[i].first - first + cut + take);
    }
  }
};

// The panels that tokens `from` to `to` of a stretch see, and which keys of them each sees.
template <typename T>
void look(const Sight& sight, int64_t from, int64_t to, int64_t panels, Room<T>& room) {
  std::vector<int64_t> place(panels, -1);
  room.panels.clear();
  for (int64_t t = from; t < to; t++) {
    sight.each(t, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin / PANEL; p <= (end - 1) / PANEL; p++) place[p] = 0;
    });
  }
  for (int64_t p = 0; p < panels; p++) {
    if (place[p] < 0) continue;
    place[p] = int64_t(room.panels.size());
    room.panels.push_back(p);
  }
  int64_t count = int64_t(room.panels.size());
  room.seen.assign((to - from) * count, 0);
  for (int64_t t = from; t < to; t++) {
    uint32_t* seen = room.seen.data() + (t - from) * count;
    sight.each(t, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin / PANEL; p <= (end - 1) / PANEL; p++) {
        int64_t low = std::max<int64_t>(0, begin - p * PANEL), high = std::min(PANEL, end - p * PANEL);
        uint32_t upto = high == PANEL ? ~uint32_t(0) : (uint32_t(1) << high) - 1;
        seen[place[p]] |= upto & ~((uint32_t(1) << low) - 1);
      }
    });
  }
}

// The tokens of a pass as the forward saw them: `qkv` holds turned queries and keys and the values, `d_qkv` gets
// their gradients. All keys are rows of the pass itself.
template <typename T>
struct Pass {
  const T* qkv;
  const float* d_out;
  float* d_qkv;
  int64_t kv_heads;
  Heads h;

  int64_t across() const { return kv_heads * (h.group + 2) * h.dims; }

  // Queries and the slopes of their results, `rows` of them, as rows and as columns.
  BF16 void gather(int64_t token, int64_t count, int64_t head, int64_t rows, Room<T>& room) const {
    int64_t dims = h.dims, row = 0;
    for (auto* part : {&room.query, &room.out, &room.query_turned, &room.out_turned}) {
      part->resize(std::max<size_t>(part->size(), rows * dims));
      std::memset(static_cast<void*>(part->data()), 0, rows * dims * sizeof(T));
    }
    for (int64_t t = token; t < token + count; t++) {
      for (int64_t g = 0; g < h.group; g++, row++) {
        int64_t at = (head * h.group + g) * dims;
        const float* out = d_out + t * kv_heads * h.group * dims + at;
        std::memcpy(room.query.data() + row * dims, qkv + t * across() + at, dims * sizeof(T));
        for (int64_t d = 0; d < dims; d += 16) {
          __mmask16 mask = first_of_16(dims - d);
          narrowed(room.out.data() + row * dims + d, mask, _mm512_maskz_loadu_ps(mask, out + d));
        }
      }
    }
    turn_rows(room.query.data(), row, dims, room.query_turned.data(), rows);
    turn_rows(room.out.data(), row, dims, room.out_turned.data(), rows);
  }

  // `count` tokens of a stretch from `from` on, the first at row `token` of the pass: the gradients of their queries,
  // and what they add to those of the keys and values of the tree's panels, `[dims, 32]` each.
  BF16 void attend_block(const Side<T>& side, const Sight& sight, int64_t from, int64_t count, int64_t token,
                         int64_t head, float* d_keys, float* d_values, Room<T>& room) const {
    int64_t dims = h.dims, depth = side.depth, rows = count * h.group, even = rows + rows % PER_WORD<T>;
    gather(token, count, head, even, room);
    look(sight, from, from + count, side.panels, room);
    int64_t panels = int64_t(room.panels.size()), size = panels * even * PANEL;
    for (auto* part : {&room.products, &room.slopes}) part->resize(std::max<size_t>(part->size(), size));
    for (auto* part : {&room.shares, &room.back}) {
      part->resize(std::max<size_t>(part->size(), size));
      // The row that only fills a word up.
      for (int64_t j = 0; j < panels && even > rows; j++) {
        std::memset(static_cast<void*>(part->data() + (j * even + rows) * PANEL), 0, PANEL * sizeof(T));
      }
    }
    for (int64_t j = 0; j < panels; j++) {
      int64_t at = j * even * PANEL, panel = room.panels[j] * side.size();
      block(room.query.data(), depth, rows, side.keys.data() + panel, depth, true, room.products.data() + at);
      block(room.out.data(), depth, rows, side.values.data() + panel, depth, true, room.slopes.data() + at);
    }
    for (int64_t r = 0; r < rows; r++) {
      const uint32_t* seen = room.seen.data() + r / h.group * panels;
      softmax_back(room.products.data() + r * PANEL, room.slopes.data() + r * PANEL, seen, panels, even, h.scale,
                   room.shares.data() + r * PANEL, room.back.data() + r * PANEL);
    }
    room.d_query.resize(side.chunks * even * PANEL);
    room.panel.resize(even / PER_WORD<T> * PANEL);
    for (int64_t j = 0; j < panels; j++) {
      const T *shares = room.shares.data() + j * even * PANEL, *back = room.back.data() + j * even * PANEL;
      int64_t p = room.panels[j], inner = even / PER_WORD<T>;
      for (int64_t c = 0; c < side.chunks; c++) {
        const word* panel = side.by_key.data() + (p * side.chunks + c) * KEYS<T> * PANEL;
        block(back, KEYS<T>, rows, panel, KEYS<T>, j == 0, room.d_query.data() + c * even * PANEL);
      }
      pack_columns(shares, PANEL, PANEL, inner, room.panel.data());
      block(room.out_turned.data(), inner, dims, room.panel.data(), inner, false, d_values + p * dims * PANEL);
      pack_columns(back, PANEL, PANEL, inner, room.panel.data());
      block(room.query_turned.data(), inner, dims, room.panel.data(), inner, false, d_keys + p * dims * PANEL);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* to = d_qkv + (token + r / h.group) * across() + (head * h.group + r % h.group) * dims;
      for (int64_t c = 0; c < side.chunks; c++) {
        const float* from = room.d_query.data() + (c * even + r) * PANEL;
        std::memcpy(to + c * PANEL, from, std::min(PANEL, dims - c * PANEL) * 4);
      }
    }
  }

  // Adds up what a tree's stretches gave to a head's keys and values.
  BF16 void finish(const Tree& tree, int64_t head, const float* const* parts, int64_t count, int64_t panels) const {
    int64_t dims = h.dims, half = panels * dims * PANEL;
    std::vector<float> sums(dims * PANEL), turned(PANEL * dims);
    for (int64_t p = 0; p < 2 * panels; p++) {
      int64_t token = p % panels * PANEL, here = std::min(PANEL, tree.tokens - token);
      const int64_t at = p * dims * PANEL;
      std::memcpy(sums.data(), parts[0] + at, sums.size() * 4);
      for (int64_t i = 1; i < count; i++) {
        for (size_t n = 0; n < sums.size(); n++) sums[n] += parts[i][at + n];
      }
      turn_rows(sums.data(), dims, PANEL, turned.data(), dims);
      float* to = d_qkv + (tree.first + token) * across() + (kv_heads * h.group + head) * dims;
      if (at >= half) to += kv_heads * dims;
      for (int64_t t = 0; t < here; t++) std::memcpy(to + t * across(), turned.data() + t * dims, dims * 4);
    }
  }
};

template <typename T>
void attend(const T* qkv, const float* d_out, const int64_t* stretches_of, int64_t trees, const Stretch* stretches,
            const Rows* rows, int64_t window, int64_t kv_heads, Heads h, float* d_qkv) {
  // A stretch of one head: what threads take one after the other.
  struct Work {
    int64_t tree, token, panels;
    Sight sight;
    std::vector<float> sums;
  };
  Pass<T> pass{qkv, d_out, d_qkv, kv_heads, h};
  std::vector<Tree> all;
  std::vector<Work> works;
  int64_t token = 0;
  for (int64_t i = 0; i < trees; i++) {
    Tree tree{stretches_of[i], token, 0};
    for (int64_t s = 0; s < tree.stretches; s++, stretches++) {
      int64_t keys = 0;
      for (int64_t r = 0; r < stretches->spans; r++) keys += rows[r].count;
      Sight sight{rows, stretches->spans, tree.first, keys, stretches->tokens, window};
      works.push_back(Work{i, token, 0, sight, {}});
      token += stretches->tokens;
      rows += stretches->spans;
    }
    tree.tokens = token - tree.first;
    all.push_back(tree);
  }
  int64_t count = int64_t(works.size());
  std::vector<Work> each;
  for (int64_t head = 0; head < kv_heads; head++) each.insert(each.end(), works.begin(), works.end());
#pragma omp parallel
  {
    Room<T> room;
    Side<T> side;
    int64_t packed = -1;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count * kv_heads; i++) {
      Work& work = each[i];
      const Tree& tree = all[work.tree];
      int64_t head = i / count, at = (kv_heads * h.group + head) * h.dims, wanted = head * trees + work.tree;
      if (packed != wanted) {
        const T* from = qkv + tree.first * pass.across();
        side.pack(from + at, from + at + kv_heads * h.dims, pass.across(), tree.tokens, h.dims);
        packed = wanted;
      }
      int64_t half = side.panels * h.dims * PANEL;
      work.panels = side.panels;
      work.sums.assign(2 * half, 0.0f);
      float *d_keys = work.sums.data(), *d_values = d_keys + half;
      // Blocks of about one size.
      int64_t blocks = (work.sight.tokens * h.group + QUERIES - 1) / QUERIES;
      int64_t most = (work.sight.tokens + blocks - 1) / std::max<int64_t>(1, blocks);
      for (int64_t t = 0; t < work.sight.tokens; t += most) {
        int64_t here = std::min(most, work.sight.tokens - t);
        pass.attend_block(side, work.sight, t, here, work.token + t, head, d_keys, d_values, room);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < trees * kv_heads; i++) {
      int64_t head = i / trees;
      std::vector<const float*> parts;
      int64_t panels = 0;
      for (int64_t w = head * count; w < (head + 1) * count; w++) {
        if (each[w].tree != i % trees) continue;
        parts.push_back(each[w].sums.data());
        panels = each[w].panels;
      }
      pass.finish(all[i % trees], head, parts.data(), int64_t(parts.size()), panels);
    }
  }
}
#endif

}  // namespace

extern "C" {

void flowrun_norm_back(const float* x, const float* weight, float eps, const float* dy, float* dx, int64_t rows,
                       int64_t width) {
#pragma omp parallel for if (rows * width >= SHARED_FROM)
  for (int64_t r = 0; r < rows; r++) {
    norm_row(x + r * width, weight, eps, dy + r * width, dx + r * width, width);
  }
}

void flowrun_gate_back_bf16(const bf16* gate_up, const float* dy, bf16* d, int64_t rows, int64_t width, bool gelu) {
  gate(gate_up, dy, d, rows, width, gelu, gate_row_bf16);
}
void flowrun_gate_back_f32(const float* gate_up, const float* dy, float* d, int64_t rows, int64_t width, bool gelu) {
  gate(gate_up, dy, d, rows, width, gelu, gate_row_f32);
}

void flowrun_turn_back_bf16(const bf16* qkv, int64_t rows, int64_t heads, int64_t queries, int64_t keys, int64_t width,
                            const float* q_norm, const float* k_norm, float eps, const bf16* cos, const bf16* sin,
                            int64_t dims, const float* after, bf16* before) {
  turn(qkv, rows, heads, queries, keys, width, q_norm, k_norm, eps, cos, sin, dims, after, before, turn_head_bf16);
}
void flowrun_turn_back_f32(const float* qkv, int64_t rows, int64_t heads, int64_t queries, int64_t keys, int64_t width,
                           const float* q_norm, const float* k_norm, float eps, const float* cos, const float* sin,
                           int64_t dims, const float* after, float* before) {
  turn(qkv, rows, heads, queries, keys, width, q_norm, k_norm, eps, cos, sin, dims, after, before, turn_head_f32);
}

void flowrun_targets_bf16(const float* logits, const int64_t* wanted, int64_t rows, int64_t count, float* log_probs,
                          bf16* d) {
  targets(logits, wanted, rows, count, log_probs, d, target_row_bf16);
}
void flowrun_targets_f32(const float* logits, const int64_t* wanted, int64_t rows, int64_t count, float* log_probs,
                         float* d) {
  targets(logits, wanted, rows, count, log_probs, d, target_row_f32);
}

#if defined(__x86_64__)
void flowrun_attend_back_bf16(const bf16* qkv, const float* d_out, const int64_t* stretches_of, int64_t trees,
                              const Stretch* stretches, const Rows* rows, int64_t window, int64_t kv_heads,
                              int64_t group, int64_t dims, float scale, float* d_qkv) {
  attend(qkv, d_out, stretches_of, trees, stretches, rows, window, kv_heads, Heads{group, dims, scale, 0}, d_qkv);
}
void flowrun_attend_back_f32(const float* qkv, const float* d_out, const int64_t* stretches_of, int64_t trees,
                             const Stretch* stretches, const Rows* rows, int64_t window, int64_t kv_heads,
                             int64_t group, int64_t dims, float scale, float* d_qkv) {
  attend(qkv, d_out, stretches_of, trees, stretches, rows, window, kv_heads, Heads{group, dims, scale, 0}, d_qkv);
}
#else
// Never called: flowrun_has_bf16_products() says no.
void flowrun_attend_back_bf16() {}
void flowrun_attend_back_f32() {}
#endif
}
