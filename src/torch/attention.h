// Attention of many queries of one sequence, in tiles: the products of queries and keys and of shares and values are
// those of tiles.h.
//
// A query's numbers depend on its own keys alone, counted from the first that its stretch may see: not on what other
// queries it is computed with.

#pragma once

#include "tiles.h"

#if defined(__x86_64__)
namespace {

// Some tokens of a stretch, of which `count` follow the `from` first, and the keys that the stretch may see.
struct Chunk {
  const Rows* rows;
  int64_t spans, all, tokens, from, count;

  // Keys that the token `t` of the chunk sees, from the first of the stretch's on.
  int64_t sees(int64_t t) const { return all - tokens + from + t + 1; }
};

// What a thread needs for a chunk and for a block of its queries.
template <typename T>
struct Seat {
  std::vector<word> keys, values;
  std::vector<T> key, value, query, shares;
  std::vector<float> products, sums, totals;
};

// From a query's products with the keys `low` to `high` to shares before they are divided by their sum, which is
// returned. The row's numbers of panel j are at 32 j `stride`, and the first is of key 0.
template <typename T>
BF16 float softmax_row(float* products, int64_t low, int64_t high, int64_t panels, int64_t stride, float scale,
                       T* shares) {
  auto seen = [&](int64_t key) BF16 {
    return __mmask16(first_of_16(high - key) & ~first_of_16(low - key));
  };
  __m512 largest = _mm512_set1_ps(-3.0e38f), factor = _mm512_set1_ps(scale), total = _mm512_setzero_ps();
  for (int64_t j = 0; j < 2 * panels; j++) {
    __m512 product = _mm512_loadu_ps(products + j / 2 * stride * PANEL + j % 2 * 16);
    largest = _mm512_mask_max_ps(largest, seen(16 * j), largest, product);
  }
  __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (int64_t j = 0; j < 2 * panels; j++) {
    int64_t at = j / 2 * stride * PANEL + j % 2 * 16;
    __m512 power = exp_neg_16(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(products + at), most), factor));
    power = _mm512_maskz_mov_ps(seen(16 * j), power);
    total = _mm512_add_ps(total, power);
    narrowed(shares + at, 0xffff, power);
  }
  return _mm512_reduce_add_ps(total);
}

// Packs the keys and values of a kv head from key `low` to `high`, which is a multiple of 32 before the first panel.
template <typename T>
BF16 void pack_seen(const Source* sources, const Chunk& chunk, int64_t head, int64_t dims, int64_t low, int64_t high,
                    Seat<T>& seat) {
  int64_t depth = dims / PER_WORD<T>, chunks = (dims + PANEL - 1) / PANEL, panels = (high - low + PANEL - 1) / PANEL;
  int64_t size = (depth + 16) * PANEL, part = KEYS<T> * PANEL;
  seat.keys.resize(std::max<size_t>(seat.keys.size(), panels * size));
  seat.values.resize(std::max<size_t>(seat.values.size(), panels * chunks * part));
  for (auto* rows : {&seat.key, &seat.value}) rows->resize(PANEL * dims);
  const Rows* span = chunk.rows;
  int64_t before = 0;
  for (int64_t p = 0; p < panels; p++) {
    int64_t first = low + p * PANEL, here = std::min(PANEL, high - first);
    // Rows beyond the last key count nothing, and must be numbers.
    std::memset(static_cast<void*>(seat.value.data()), 0, PANEL * dims * sizeof(T));
    for (int64_t i = 0; i < here; i++) {
      while (first + i >= before + span->count) before += (span++)->count;
      const Source& source = sources[span->source];
      int64_t at = (span->first + first + i - before) * source.stride + head * dims;
      std::memcpy(seat.key.data() + i * dims, static_cast<const T*>(source.keys) + at, dims * sizeof(T));
      std::memcpy(seat.value.data() + i * dims, static_cast<const T*>(source.values) + at, dims * sizeof(T));
    }
    pack_rows(reinterpret_cast<const word*>(seat.key.data()), depth, here, depth, seat.keys.data() + p * size);
    for (int64_t c = 0; c < chunks; c++) {
      word* to = seat.values.data() + (p * chunks + c) * part;
      pack_columns(seat.value.data() + c * PANEL, dims, std::min(PANEL, dims - c * PANEL), KEYS<T>, to);
    }
  }
}

// All queries of a chunk that share the kv head: `q` is the chunk's first token, `stride` numbers to the next, `out`
// likewise with `kv_heads` times group times dims.
template <typename T>
BF16 void attend_chunk(const T* q, int64_t stride, const Source* sources, const Chunk& chunk, int64_t window,
                       int64_t head, int64_t kv_heads, Heads h, T* out, Seat<T>& seat) {
  int64_t dims = h.dims, depth = dims / PER_WORD<T>, chunks = (dims + PANEL - 1) / PANEL;
  int64_t size = (depth + 16) * PANEL, part = KEYS<T> * PANEL;
  auto hidden = [&](int64_t t) { return std::max<int64_t>(0, chunk.sees(t) - window); };
  int64_t low = hidden(0) / PANEL * PANEL;
  pack_seen(sources, chunk, head, dims, low, chunk.sees(chunk.count - 1), seat);
  int64_t blocks = (chunk.count * h.group + QUERIES - 1) / QUERIES, each = (chunk.count + blocks - 1) / blocks;
  for (int64_t t = 0; t < chunk.count; t += each) {
    int64_t here = std::min(each, chunk.count - t), rows = here * h.group;
    // Counted from `low`, as is all that follows.
    int64_t first = (hidden(t) - low) / PANEL, panels = (chunk.sees(t + here - 1) - low + PANEL - 1) / PANEL - first;
    seat.query.resize(std::max<size_t>(seat.query.size(), rows * dims));
    for (int64_t i = 0; i < here; i++) {
      const T* from = q + (t + i) * stride + head * h.group * dims;
      std::memcpy(seat.query.data() + i * h.group * dims, from, h.group * dims * sizeof(T));
    }
    seat.products.resize(std::max<size_t>(seat.products.size(), panels * rows * PANEL));
    seat.shares.resize(std::max<size_t>(seat.shares.size(), panels * rows * PANEL));
    for (int64_t j = 0; j < panels; j++) {
      const word* panel = seat.keys.data() + (first + j) * size;
      block(seat.query.data(), depth, rows, panel, depth, true, seat.products.data() + j * rows * PANEL);
    }
    seat.totals.resize(std::max<size_t>(seat.totals.size(), rows));
    int64_t base = low + first * PANEL;
    for (int64_t r = 0; r < rows; r++) {
      int64_t token = t + r / h.group;
      seat.totals[r] = softmax_row(seat.products.data() + r * PANEL, hidden(token) - base, chunk.sees(token) - base,
                                   panels, rows, h.scale, seat.shares.data() + r * PANEL);
    }
    seat.sums.resize(std::max<size_t>(seat.sums.size(), rows * PANEL));
    for (int64_t c = 0; c < chunks; c++) {
      for (int64_t j = 0; j < panels; j++) {
        const word* panel = seat.values.data() + ((first + j) * chunks + c) * part;
        block(seat.shares.data() + j * rows * PANEL, KEYS<T>, rows, panel, KEYS<T>, j == 0, seat.sums.data());
      }
      for (int64_t r = 0; r < rows; r++) {
        T* to = out + ((t + r / h.group) * kv_heads + head) * h.group * dims + r % h.group * dims + c * PANEL;
        __m512 share = _mm512_set1_ps(1.0f / seat.totals[r]);
        for (int64_t half = 0; half < 2; half++) {
          __m512 sum = _mm512_loadu_ps(seat.sums.data() + r * PANEL + 16 * half);
          narrowed(to + 16 * half, first_of_16(dims - c * PANEL - 16 * half), _mm512_mul_ps(sum, share));
        }
      }
    }
  }
}

}  // namespace
#endif
