// AdamW on all parameters at once, unless a gradient or the loss is not finite.
//
//     m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
//     p = (1 - lr decay) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//
// at its step t of each tensor (Loshchilov & Hutter 2019, algorithm 2), with the gradients
// scaled to a norm of at most ``clip``. Two launches: sums of squares of the gradients,
// then the update, whose blocks each add these up, in one order. A block has CHUNK numbers
// of one tensor: few enough that a small model fills a GPU.
//
// Defined before this file: what common.cu has; TENSORS, at most, of a launch; CHUNK.

constexpr int THREADS = 256;

// Every field has eight bytes: the host packs them without gaps.
struct Args {
  float *p[TENSORS];
  const float *g[TENSORS];
  float *m[TENSORS], *v[TENSORS], *step[TENSORS];
  const float *lr[TENSORS];
  i64 size[TENSORS], first[TENSORS];  // the first of its chunks
  double decay[TENSORS];
  const float *loss;
  float *squares;  // of every chunk of every launch; this launch's from ``start`` on
  float *next;     // step + 1 of every tensor of this launch
  float *norm, *skip;  // skip: 1 from the first step on that is left out
  i64 tensors, start, chunks;
  double log_b1, log_b2, keep_m, keep_v, eps, clip;  // keep: 1 - b
};

// The block's part of its tensor.
struct Part {
  int tensor = 0;
  i64 begin, end;
  __device__ explicit Part(const Args &a) {
    while (tensor + 1 < a.tensors && blockIdx.x >= a.first[tensor + 1]) tensor++;
    begin = (blockIdx.x - a.first[tensor]) * CHUNK;
    end = min(begin + CHUNK, a.size[tensor]);
  }
};

__device__ float4 load(const float *x, i64 i, i64 end) {
  if (i + 4 <= end) return *reinterpret_cast<const float4 *>(x + i);
  const float y = i + 1 < end ? x[i + 1] : 0.f, z = i + 2 < end ? x[i + 2] : 0.f;
  return make_float4(x[i], y, z, 0.f);
}

__device__ void store(float *x, i64 i, i64 end, float4 y) {
  if (i + 4 <= end) {
    *reinterpret_cast<float4 *>(x + i) = y;
    return;
  }
  x[i] = y.x;
  if (i + 1 < end) x[i + 1] = y.y;
  if (i + 2 < end) x[i + 2] = y.z;
}

__device__ float block_sum(float x) {
  extern __shared__ float4 shared[];
  float *sums = reinterpret_cast<float *>(shared);
  sums[threadIdx.x] = x;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

__device__ bool finite(float x) { return x - x == 0.f; }

extern "C" __global__ void __launch_bounds__(THREADS)
square(const __grid_constant__ Args a) {
  const Part part(a);
  const int k = part.tensor;
  float sum = 0.f;
#pragma unroll 4
  for (i64 i = part.begin + 4 * threadIdx.x; i < part.end; i += 4 * THREADS) {
    const float4 g = load(a.g[k], i, part.end);
    sum = fmaf(g.x, g.x, fmaf(g.y, g.y, fmaf(g.z, g.z, fmaf(g.w, g.w, sum))));
  }
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  a.squares[a.start + blockIdx.x] = sum;
  if (part.begin == 0) a.next[k] = *a.step[k] + 1.f;
}

struct Rates {
  float keep_m, keep_v, eps, scale, shrink, rate, root;

  __device__ Rates(const Args &a, int k, float scale)
      : keep_m((float)a.keep_m), keep_v((float)a.keep_v), eps((float)a.eps), scale(scale) {
    const float t = a.next[k], lr = *a.lr[k];
    shrink = 1.f - lr * (float)a.decay[k];
    rate = lr / -expm1f(t * (float)a.log_b1);  // 1 - b^t keeps its digits so
    root = 1.f / sqrtf(-expm1f(t * (float)a.log_b2));
  }

  __device__ void apply(float &p, float g, float &m, float &v) const {
    g *= scale;
    m = fmaf(keep_m, g - m, m);
    v = fmaf(keep_v, fmaf(g, g, -v), v);
    p = p * shrink - rate * m / fmaf(sqrtf(v), root, eps);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
update(const __grid_constant__ Args a) {
  const Part part(a);
  const int k = part.tensor;
  float sum = 0.f;
  for (i64 i = threadIdx.x; i < a.chunks; i += THREADS) sum += a.squares[i];
  const float norm = sqrtf(block_sum(sum)), clip = (float)a.clip;
  const bool whole = finite(norm) && finite(*a.loss) && *a.skip == 0.f;
  if (threadIdx.x == 0 && part.begin == 0) {
    if (whole) *a.step[k] = a.next[k];
    if (k == 0) *a.norm = norm;
    // Other blocks may read this before or after: they come to the same conclusion.
    if (k == 0 && !whole) *a.skip = 1.f;
  }
  if (!whole) return;
  const Rates rates(a, k, clip > 0.f ? min(1.f, clip / (norm + 1e-6f)) : 1.f);
#pragma unroll 4
  for (i64 i = part.begin + 4 * threadIdx.x; i < part.end; i += 4 * THREADS) {
    float4 p = load(a.p[k], i, part.end), m = load(a.m[k], i, part.end);
    float4 v = load(a.v[k], i, part.end);
    const float4 g = load(a.g[k], i, part.end);
    rates.apply(p.x, g.x, m.x, v.x), rates.apply(p.y, g.y, m.y, v.y);
    rates.apply(p.z, g.z, m.z, v.z), rates.apply(p.w, g.w, m.w, v.w);
    store(a.p[k], i, part.end, p);
    store(a.m[k], i, part.end, m);
    store(a.v[k], i, part.end, v);
  }
}
