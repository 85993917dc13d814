// Backward of what a pass computes between its products, on a CPU: norms, rotations, gates, attention, the head's
// softmax. Each reads bf16 or float32 and computes in float32.
//
// Plain pointers come in; gradient.rs beside this file has checked shapes and types.

#include "cpu.h"

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

// Heads of one kv head in float32, each padded to whole vectors.
struct Side {
  float *keys, *values, *d_keys, *d_values;
};

// Lane n is the product of `x` with row n of `rows`, VECTORS wide, or with row `last`.
template <int VECTORS>
BF16 inline __m512 dots_of_16(const float* x, const float* rows, int64_t last) {
  __m512 part[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) part[i] = _mm512_setzero_ps();
  for (int v = 0; v < VECTORS; v++) {
    __m512 left = _mm512_loadu_ps(x + 16 * v);
#pragma GCC unroll 16
    for (int n = 0; n < 16; n++) {
      __m512 row = _mm512_loadu_ps(rows + (n < last ? n : last) * 16 * VECTORS + 16 * v);
      part[4 * (n % 4) + n / 4] = _mm512_fmadd_ps(left, row, part[4 * (n % 4) + n / 4]);
    }
  }
  return sums_of_16(part);
}

// Some keys that a query sees, one after the other.
struct Seen {
  int64_t first, count;
};

// From products to shares and from the values' slopes to the products' slopes.
WIDE void softmax_back(float* p, float* d, int64_t count, float scale) {
  float largest = p[0], total = 0, along = 0;
  for (int64_t j = 1; j < count; j++) largest = p[j] > largest ? p[j] : largest;
  for (int64_t j = 0; j < count; j++) {
    p[j] = exp_neg((p[j] - largest) * scale);
    total += p[j];
  }
  float share = 1.0f / total;
  for (int64_t j = 0; j < count; j++) {
    p[j] *= share;
    along += p[j] * d[j];
  }
  for (int64_t j = 0; j < count; j++) d[j] = p[j] * (d[j] - along) * scale;
}

// One query over the keys that it sees.
template <int VECTORS>
BF16 void attend_query(const float* q, const float* d_out, const Side& side, const Seen* seen, int64_t parts,
                       float scale, float* shares, float* slopes, float* d_q) {
  constexpr int64_t WIDTH = 16 * VECTORS;
  int64_t at = 0;
  for (const Seen* s = seen; s < seen + parts; at += s->count, s++) {
    for (int64_t j = 0; j < s->count; j += 16) {
      int64_t last = std::min<int64_t>(15, s->count - 1 - j), row = (s->first + j) * WIDTH;
      _mm512_storeu_ps(shares + at + j, dots_of_16<VECTORS>(q, side.keys + row, last));
      _mm512_storeu_ps(slopes + at + j, dots_of_16<VECTORS>(d_out, side.values + row, last));
    }
  }
  softmax_back(shares, slopes, at, scale);
  __m512 query[VECTORS], out[VECTORS], sum[VECTORS];
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; v++) {
    query[v] = _mm512_loadu_ps(q + 16 * v);
    out[v] = _mm512_loadu_ps(d_out + 16 * v);
    sum[v] = _mm512_setzero_ps();
  }
  at = 0;
  for (const Seen* s = seen; s < seen + parts; at += s->count, s++) {
    for (int64_t j = 0; j < s->count; j++) {
      int64_t row = (s->first + j) * WIDTH;
      __m512 share = _mm512_set1_ps(shares[at + j]), slope = _mm512_set1_ps(slopes[at + j]);
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v++) {
        float *d_key = side.d_keys + row + 16 * v, *d_value = side.d_values + row + 16 * v;
        sum[v] = _mm512_fmadd_ps(slope, _mm512_loadu_ps(side.keys + row + 16 * v), sum[v]);
        _mm512_storeu_ps(d_key, _mm512_fmadd_ps(slope, query[v], _mm512_loadu_ps(d_key)));
        _mm512_storeu_ps(d_value, _mm512_fmadd_ps(share, out[v], _mm512_loadu_ps(d_value)));
      }
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(d_q + 16 * v, sum[v]);
}

using Query = void (*)(const float*, const float*, const Side&, const Seen*, int64_t, float, float*, float*, float*);

Query query_of(int64_t vectors) {
  static constexpr Query QUERIES[16] = {
      attend_query<1>,  attend_query<2>,  attend_query<3>,  attend_query<4>, attend_query<5>,  attend_query<6>,
      attend_query<7>,  attend_query<8>,  attend_query<9>,  attend_query<10>, attend_query<11>, attend_query<12>,
      attend_query<13>, attend_query<14>, attend_query<15>, attend_query<16>};
  return QUERIES[vectors - 1];
}

// `dims` numbers of a head to a row of whole vectors, and back.
template <typename T>
BF16 void widen_head(const T* from, int64_t dims, float* to) {
  for (int64_t d = 0; d < dims; d += 16) {
    __mmask16 mask = dims - d >= 16 ? 0xffff : __mmask16((1 << (dims - d)) - 1);
    _mm512_storeu_ps(to + d, widened(from + d, mask));
  }
}

// Stretches that share keys with each other and with no others: a prompt and its answers.
struct Tree {
  int64_t stretches, first, tokens;
};

// What one kv head of one tree needs, so that it is made once a thread.
struct Room {
  std::vector<float> keys, values, d_keys, d_values, shares, slopes, query, out, d_query;
  std::vector<Seen> seen;
};

// The tokens of a pass as the forward saw them: `qkv` holds turned queries and keys and the values, `d_qkv` gets
// their gradients. All keys are rows of the pass itself.
template <typename T>
void attend_tree(const T* qkv, const float* d_out, const Tree& tree, const Stretch* stretches, const Rows* rows,
                 int64_t head, int64_t kv_heads, Heads h, int64_t window, float* d_qkv, Room& room) {
  int64_t vectors = (h.dims + 15) / 16, width = 16 * vectors, heads = kv_heads * (h.group + 2), across = heads * h.dims;
  int64_t key_at = (kv_heads * h.group + head) * h.dims, value_at = key_at + kv_heads * h.dims;
  Query query = query_of(vectors);
  size_t size = size_t((tree.tokens + 1) * width);
  for (auto* part : {&room.keys, &room.values, &room.d_keys, &room.d_values}) part->assign(size, 0.0f);
  for (auto* part : {&room.query, &room.out, &room.d_query}) part->assign(width, 0.0f);
  for (int64_t t = 0; t < tree.tokens; t++) {
    const T* token = qkv + (tree.first + t) * across;
    widen_head(token + key_at, h.dims, room.keys.data() + t * width);
    widen_head(token + value_at, h.dims, room.values.data() + t * width);
  }
  Side side{room.keys.data(), room.values.data(), room.d_keys.data(), room.d_values.data()};
  int64_t token = tree.first;
  for (const Stretch* s = stretches; s < stretches + tree.stretches; rows += s->spans, s++) {
    int64_t all = 0;
    for (int64_t i = 0; i < s->spans; i++) all += rows[i].count;
    if (int64_t(room.shares.size()) < all + 16 * s->spans + 16) {
      room.shares.resize(all + 16 * s->spans + 16);
      room.slopes.resize(all + 16 * s->spans + 16);
    }
    room.seen.resize(std::max<size_t>(room.seen.size(), s->spans));
    for (int64_t t = 1; t <= s->tokens; t++, token++) {
      int64_t sees = all - s->tokens + t, skip = std::max<int64_t>(0, sees - window), left = sees - skip, parts = 0;
      for (int64_t i = 0; i < s->spans && left > 0; i++) {
        int64_t cut = std::min(skip, rows[i].count), take = std::min(rows[i].count - cut, left);
        skip -= cut;
        left -= take;
        if (take > 0) room.seen[parts++] = Seen{rows[i].first - tree.first + cut, take};
      }
      for (int64_t g = 0; g < h.group; g++) {
        int64_t at = (head * h.group + g) * h.dims;
        widen_head(qkv + token * across + at, h.dims, room.query.data());
        widen_head(d_out + token * kv_heads * h.group * h.dims + at, h.dims, room.out.data());
        query(room.query.data(), room.out.data(), side, room.seen.data(), parts, h.scale, room.shares.data(),
              room.slopes.data(), room.d_query.data());
        std::memcpy(d_qkv + token * across + at, room.d_query.data(), h.dims * 4);
      }
    }
  }
  for (int64_t t = 0; t < tree.tokens; t++) {
    float* to = d_qkv + (tree.first + t) * across;
    std::memcpy(to + key_at, room.d_keys.data() + t * width, h.dims * 4);
    std::memcpy(to + value_at, room.d_values.data() + t * width, h.dims * 4);
  }
}

template <typename T>
void attend(const T* qkv, const float* d_out, const int64_t* stretches_of, int64_t trees, const Stretch* stretches,
            const Rows* rows, int64_t window, int64_t kv_heads, Heads h, float* d_qkv) {
  struct Place {
    Tree tree;
    const Stretch* stretches;
    const Rows* rows;
  };
  std::vector<Place> places;
  int64_t token = 0;
  for (int64_t i = 0; i < trees; i++) {
    Place place{Tree{stretches_of[i], token, 0}, stretches, rows};
    for (int64_t s = 0; s < stretches_of[i]; s++, stretches++) {
      place.tree.tokens += stretches->tokens;
      rows += stretches->spans;
    }
    token += place.tree.tokens;
    places.push_back(place);
  }
#pragma omp parallel
  {
    Room room;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < trees * kv_heads; i++) {
      const Place& place = places[i / kv_heads];
      attend_tree(qkv, d_out, place.tree, place.stretches, place.rows, i % kv_heads, kv_heads, h, window, d_qkv, room);
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
