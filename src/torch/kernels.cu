// What a pass without gradients computes on a GPU between libtorch's products: one launch where libtorch makes
// four to ten. Reads bf16, computes in float32, rounds once.
//
// Compiled when a GPU is first used (kernels.rs), without CUDA's headers. kernels_host.cpp compiles it for the
// host, where every thread of a block is one of the system's, so that tests need no GPU.

typedef long long i64;
typedef unsigned long long u64;

struct bf16 {
  unsigned short bits;
};

union Bits {
  float number;
  unsigned bits;
};

__device__ inline float wide(bf16 x) {
  Bits b;
  b.bits = (unsigned)x.bits << 16;
  return b.number;
}

// To nearest, ties to even; NaN stays NaN.
__device__ inline bf16 narrow(float x) {
  Bits b;
  b.number = x;
  bf16 result;
  result.bits = (b.bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0
                                                      : (unsigned short)((b.bits + 0x7fffu + ((b.bits >> 16) & 1u)) >> 16);
  return result;
}

// Threads of a block in kernels that add up over it; a power of two.
const unsigned THREADS = 256;

// The sum over the block, for every thread. All threads come here.
__device__ inline float sum_of_block(float x, float* shared) {
  shared[threadIdx.x] = x;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  float sum = shared[0];
  __syncthreads();
  return sum;
}

// A block a row. Adds `add` (may be null) to the stream `x` and norms the sum.
extern "C" __global__ void __launch_bounds__(THREADS)
    gpu_norm(float* x, const bf16* add, const float* weight, float eps, bf16* out, i64 width) {
  __shared__ float sums[THREADS];
  i64 row = (i64)blockIdx.x * width;
  float sum = 0;
  for (i64 i = threadIdx.x; i < width; i += blockDim.x) {
    float value = x[row + i];
    if (add) {
      value += wide(add[row + i]);
      x[row + i] = value;
    }
    sum += value * value;
  }
  float scale = 1.0f / sqrtf(sum_of_block(sum, sums) / (float)width + eps);
  for (i64 i = threadIdx.x; i < width; i += blockDim.x) out[row + i] = narrow(x[row + i] * scale * weight[i]);
}

// A block a head (x) of a row (y): the norms of queries and keys, in place.
extern "C" __global__ void __launch_bounds__(THREADS)
    gpu_head_norm(bf16* x, i64 stride, int queries, int width, const float* q_norm, const float* k_norm, float eps) {
  __shared__ float sums[THREADS];
  bf16* head = x + blockIdx.y * stride + (i64)blockIdx.x * width;
  const float* weight = (int)blockIdx.x < queries ? q_norm : k_norm;
  float sum = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) sum += wide(head[i]) * wide(head[i]);
  float scale = 1.0f / sqrtf(sum_of_block(sum, sums) / (float)width + eps);
  for (int i = threadIdx.x; i < width; i += blockDim.x) head[i] = narrow(wide(head[i]) * scale * weight[i]);
}

// A thread a pair of dimensions that turn together: rotary embedding of the first `heads` heads of a row, in place.
// The first half of `sin` is negated.
extern "C" __global__ void __launch_bounds__(THREADS)
    gpu_turn(bf16* x, i64 stride, unsigned rows, unsigned heads, unsigned width, const bf16* cos, const bf16* sin,
             unsigned dims) {
  unsigned half = dims / 2, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * heads * half) return;
  unsigned j = i % half, row = i / (half * heads);
  bf16* head = x + row * stride + (i64)(i / half % heads) * width;
  const bf16 *c = cos + (i64)row * dims, *s = sin + (i64)row * dims;
  float a = wide(head[j]), b = wide(head[j + half]);
  head[j] = narrow(a * wide(c[j]) + b * wide(s[j]));
  head[j + half] = narrow(b * wide(c[j + half]) + a * wide(s[j + half]));
}

// A thread a number: the new token's keys and values go to their place in the row's slot, which is `length` tokens.
extern "C" __global__ void __launch_bounds__(THREADS)
    gpu_store(const bf16* k, const bf16* v, i64 stride, bf16* keys, bf16* values, const i64* positions, i64 length,
              unsigned rows, unsigned width) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * width) return;
  unsigned row = i / width, column = i % width;
  i64 position = positions[row];
  if (position < 0 || position >= length) return;
  i64 to = ((i64)row * length + position) * width + column, from = row * stride + column;
  keys[to] = k[from];
  values[to] = v[from];
}

// A thread a number: act(gate) * up.
extern "C" __global__ void __launch_bounds__(THREADS)
    gpu_gate(const bf16* gate_up, bf16* out, i64 count, i64 width, int gelu) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const bf16* row = gate_up + i / width * 2 * width;
  float gate = wide(row[i % width]), up = wide(row[width + i % width]);
  float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  float act = gelu ? 0.5f * gate * (1.0f + tanhf(inner)) : gate / (1.0f + expf(-gate));
  out[i] = narrow(act * up);
}

// An adapter's matrices at one site.
struct Loras {
  const float* a[4];
  const float* b[4];
  // Of their ranks and widths, how many come before; where their columns of the output begin.
  int rank[4], rank_before[4], width[4], width_before[4], first[4];
  int count;
};

// A block a rank (x) of a row (y): x A^T.
extern "C" __global__ void __launch_bounds__(THREADS)
    gpu_shrink(const bf16* x, i64 inner, Loras loras, float* shrunk) {
  __shared__ float sums[THREADS];
  int m = 0;
  while (m + 1 < loras.count && (int)blockIdx.x >= loras.rank_before[m + 1]) m++;
  const float* a = loras.a[m] + ((int)blockIdx.x - loras.rank_before[m]) * inner;
  const bf16* row = x + blockIdx.y * inner;
  float sum = 0;
  for (i64 i = threadIdx.x; i < inner; i += blockDim.x) sum += wide(row[i]) * a[i];
  sum = sum_of_block(sum, sums);
  if (threadIdx.x == 0) shrunk[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// A thread a column (x) of a row (y): adds the scaled product with B^T.
extern "C" __global__ void __launch_bounds__(THREADS)
    gpu_expand(const float* shrunk, int ranks, Loras loras, float scale, bf16* out, i64 outputs, int width) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  int m = 0;
  while (m + 1 < loras.count && column >= loras.width_before[m + 1]) m++;
  column -= loras.width_before[m];
  const float* b = loras.b[m] + (i64)column * loras.rank[m];
  const float* row = shrunk + (i64)blockIdx.y * ranks + loras.rank_before[m];
  float sum = 0;
  for (int i = 0; i < loras.rank[m]; i++) sum += row[i] * b[i];
  bf16* to = out + blockIdx.y * outputs + loras.first[m] + column;
  *to = narrow(wide(*to) + scale * sum);
}

__device__ inline float number(unsigned bits) {
  Bits b;
  b.bits = bits;
  return b.number;
}

// Threads of a block that draws, and of a group of them.
const unsigned DRAW_THREADS = 1024;
const unsigned GROUP = 32;

// A row of logits at a temperature, as weights of which the likeliest is 1.
struct Weights {
  const float* logits;
  int count;
  float most, temperature;
  __device__ float at(int i) const { return expf((logits[i] - most) / temperature); }
};

// Where the row is largest, the first of several. All threads come here.
__device__ inline int likeliest(const float* row, int count, float* shared, int* places) {
  float most = -3.4e38f;
  int place = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    if (row[i] > most) {
      most = row[i];
      place = i;
    }
  shared[threadIdx.x] = most;
  places[threadIdx.x] = place;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    unsigned other = threadIdx.x + half;
    if (threadIdx.x < half && (shared[other] > shared[threadIdx.x] ||
                               (shared[other] == shared[threadIdx.x] && places[other] < places[threadIdx.x]))) {
      shared[threadIdx.x] = shared[other];
      places[threadIdx.x] = places[other];
    }
    __syncthreads();
  }
  place = places[0];
  __syncthreads();
  return place;
}

// How many weights from `least` on there are, or their sum. All threads come here.
__device__ inline float from(const Weights& w, float least, bool sum, float* shared) {
  float found = 0;
  for (int i = threadIdx.x; i < w.count; i += blockDim.x) {
    float weight = w.at(i);
    if (weight >= least) found += sum ? weight : 1.0f;
  }
  return sum_of_block(found, shared);
}

// The largest weight from which on there are `goal`, or that much: halving the bits of floats from `least` to 1,
// which are in the order of the numbers.
__device__ inline float threshold(const Weights& w, float least, float goal, bool sum, float* shared) {
  Bits low, high;
  low.number = least;
  high.number = 1.0f;
  while (low.bits < high.bits) {
    Bits middle;
    middle.bits = low.bits + (high.bits - low.bits + 1) / 2;
    if (from(w, middle.number, sum, shared) >= goal)
      low = middle;
    else
      high.bits = middle.bits - 1;
  }
  return low.number;
}

// Weights that stay: those above `least`, and of those that equal it the first `ties`.
struct Filter {
  float least;
  int ties;
};

// transformers' order of filters: top-k (0 is none), top-p, min-p. The one that crosses top-p stays.
__device__ inline Filter filter(const Weights& w, int top_k, float top_p, float min_p, float* shared) {
  Filter f = {0.0f, 0x7fffffff};
  if (top_k > 0 && top_k < w.count) f.least = threshold(w, 0.0f, (float)top_k, false, shared);
  if (top_p < 1.0f) {
    float goal = top_p * from(w, f.least, true, shared);
    f.least = threshold(w, f.least, goal, true, shared);
    Bits next;
    next.number = f.least;
    next.bits += 1;
    float rest = goal - from(w, next.number, true, shared);
    f.ties = rest > f.least ? (int)ceilf(rest / f.least) : 1;
  }
  if (min_p > f.least) f = Filter{min_p < 1.0f ? min_p : 1.0f, 0x7fffffff};
  return f;
}

// The `stretch`-th of `each` neighbours, and of the equals how many are before it.
struct Stretch {
  int first, end, ties_before;
  __device__ Stretch(const Weights& w, int each, unsigned stretch, const int* ties, const int* group_ties) {
    first = (int)stretch * each;
    end = first + each < w.count ? first + each : w.count;
    ties_before = 0;
    for (unsigned g = 0; g < stretch / GROUP; g++) ties_before += group_ties[g];
    for (unsigned s = stretch / GROUP * GROUP; s < stretch; s++) ties_before += ties[s];
  }
};

// The place, from `first` to `end`, at which the sum of the weights exceeds `rest`, which is left with what goes
// beyond the places before: the last with weight where rounding leaves none, `first` where none has any.
__device__ inline unsigned descend(const float* weights, unsigned first, unsigned end, float& rest) {
  unsigned place = first;
  for (unsigned i = first; i < end; i++) {
    if (!(weights[i] > 0)) continue;
    place = i;
    if (rest < weights[i]) break;
    rest -= weights[i];
  }
  return place;
}

// The token at which the sum of the weights that stay exceeds the uniform's share of it; `place` where nothing
// has weight. All threads come here; the first of them knows.
__device__ inline int invert(const Weights& w, const Filter& f, float uniform, int place, float* sums, int* ties) {
  __shared__ float groups[DRAW_THREADS / GROUP];
  __shared__ int group_ties[DRAW_THREADS / GROUP];
  unsigned count = blockDim.x / GROUP;
  // Each thread has a stretch of neighbours, so that the stretches' sums add up in the order of the tokens.
  int each = (w.count + (int)blockDim.x - 1) / (int)blockDim.x;
  int own = 0;
  for (int i = (int)threadIdx.x * each; i < ((int)threadIdx.x + 1) * each && i < w.count; i++)
    own += w.at(i) == f.least;
  ties[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x < count) {
    own = 0;
    for (unsigned i = 0; i < GROUP; i++) own += ties[threadIdx.x * GROUP + i];
    group_ties[threadIdx.x] = own;
  }
  __syncthreads();
  Stretch mine(w, each, threadIdx.x, ties, group_ties);
  float sum = 0;
  for (int i = mine.first; i < mine.end; i++) {
    float weight = w.at(i);
    if (weight > f.least || (weight == f.least && mine.ties_before++ < f.ties)) sum += weight;
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < count) {
    sum = 0;
    for (unsigned i = 0; i < GROUP; i++) sum += sums[threadIdx.x * GROUP + i];
    groups[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return place;
  float all = 0;
  for (unsigned g = 0; g < count; g++) all += groups[g];
  float rest = (uniform < 0.99999988f ? uniform : 0.99999988f) * all;
  // Down to a group, a stretch, a token.
  unsigned group = descend(groups, 0, count, rest);
  unsigned stretch = descend(sums, group * GROUP, (group + 1) * GROUP, rest);
  Stretch found(w, each, stretch, ties, group_ties);
  for (int i = found.first; i < found.end; i++) {
    float weight = w.at(i);
    bool stays = weight > f.least || (weight == f.least && found.ties_before++ < f.ties);
    if (!stays || !(weight > 0)) continue;
    place = i;
    if (rest < weight) break;
    rest -= weight;
  }
  return place;
}

// A block a row: one token by inverse of the cumulative distribution, or the first of the likeliest at temperature
// 0, and its log-probability at temperature 1. Tokens are drawn from `lowered`, log-probabilities are of `logits`.
// `plan` is three numbers a row, `rows` apart: temperature and uniform, top-k, top-p and min-p, of two the first in
// the high half. `drawn` gets the log-probability and the token likewise.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
    gpu_draw(const float* logits, const float* lowered, int count, const u64* plan, int rows, u64* drawn) {
  __shared__ float sums[DRAW_THREADS];
  __shared__ int places[DRAW_THREADS];
  const float *row = logits + (i64)blockIdx.x * count, *low = lowered + (i64)blockIdx.x * count;
  u64 how = plan[blockIdx.x], shares = plan[2 * rows + blockIdx.x];
  float temperature = number((unsigned)(how >> 32)), uniform = number((unsigned)how);

  int place = likeliest(low, count, sums, places);
  int top = lowered == logits ? place : likeliest(row, count, sums, places);
  Weights plain = {row, count, row[top], 1.0f};
  float total = from(plain, 0.0f, true, sums);
  if (temperature > 0) {
    Weights w = {low, count, low[place], temperature};
    Filter f = filter(w, (int)plan[rows + blockIdx.x], number((unsigned)(shares >> 32)), number((unsigned)shares), sums);
    place = invert(w, f, uniform, place, sums, places);
  }
  if (threadIdx.x == 0) {
    Bits logprob;
    logprob.number = row[place] - row[top] - logf(total);
    drawn[blockIdx.x] = (u64)logprob.bits << 32 | (unsigned)place;
  }
}
