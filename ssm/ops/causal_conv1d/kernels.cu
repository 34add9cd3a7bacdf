// The short causal convolution, forward and backward, for NVIDIA GPUs; compiled at run time.
//
//     z_t = bias + sum_w weight_w x_{t-W+1+w},   y_t = z_t silu'd or as it is
//
// A warp owns 64 channels, a pair for each lane, and walks along ``steps`` steps of time
// with the last W - 1 inputs in registers. Inputs come through a ring of SLOTS stages in
// shared memory, R rows a stage, which asynchronous copies of 16 bytes fill while earlier
// stages are used: what is on its way takes no registers. A warp has a ring of its own, so
// that warps never wait for each other.
//
// Backward, g_t = dL/dz_t, with z_t computed again, and dx_t = sum_w weight_w g_{t+W-1-w}
// leaves once g_{t+W-1} is known: a warp goes W - 1 rows beyond its own. Gradients of the
// taps are summed over a warp's rows in registers, over the warps of a block in shared
// memory, over blocks by a second kernel, each in a fixed order: two runs agree in every
// bit.
//
// Defined before this file: what common.cu has; W, SILU; R, SLOTS; WARPS of a block, which
// lie behind each other in time, and BLOCKS, wanted on a multiprocessor; PARTS, the warps
// of a block of the second kernel.

constexpr int THREADS = 32 * WARPS;
constexpr int P = W - 1;                        // inputs that a step looks back on
constexpr int CHANNELS = 64;                    // of a warp
constexpr int LINE = CHANNELS * sizeof(scalar); // bytes of a warp's part of a row
constexpr int STAGE = R * LINE;
constexpr int COPIES = STAGE / (32 * 16);       // of 16 bytes a lane, in a stage
constexpr int TOGETHER = R / COPIES;            // rows that a copy of the warp covers

static_assert(1 < W && P < R, "only the first stage looks back beyond its warp's rows");

// Every field has eight bytes: the host packs them without gaps.
struct Args {
  const void *x;
  const float *weight, *bias;
  const void *dy, *dfinal;
  void *y, *final, *dx;
  float *dweight, *dbias;
  float *shares;  // of the taps' gradients and the bias's, one a block: (n, W + 1, D)
  i64 x_b, x_t, dy_b, dy_t, L, D, steps, pieces, n;
};

struct Sums {  // of a lane: the taps' gradients, and the bias's
  float2 of[W + 1];
};

__device__ float2 fma2(float2 a, float2 b, float2 c) {
  return make_float2(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y));
}

__device__ float silu_slope(float z) {
  const float s = sigmoid(z);
  return s * fmaf(z, 1.f - s, 1.f);
}

// The warp's part of the work: a row of the batch, 64 channels, and steps from ``start``.
struct Place {
  int lane, warp;
  i64 b, start, d;   // d: this lane's first channel
  i64 share;         // of the sums: the block's number among those of its channels
  int left;          // steps that there are from start on, none beyond this warp's
  bool inside;       // whether this lane's channels exist

  __device__ explicit Place(const Args &a) : lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    // 32 bits, as many as blocks have: a division of 64 is a hundred instructions
    const unsigned groups = (unsigned)((a.D + CHANNELS - 1) / CHANNELS);
    const unsigned pieces = (unsigned)a.pieces, piece = blockIdx.x / groups;
    share = piece;
    b = piece / pieces;
    start = (i64)(piece % pieces * WARPS + warp) * a.steps;
    d = blockIdx.x % groups * CHANNELS + 2 * lane;
    left = (int)max((i64)0, min(a.steps, a.L - start));
    inside = d < a.D;
  }

  // Bytes from the start of an array (B, L, D) with these strides to row t of ours.
  __device__ i64 offset(i64 t, i64 stride_b, i64 stride_t) const {
    return (b * stride_b + t * stride_t + d) * (i64)sizeof(scalar);
  }
};

// Rows of an array (B, L, D) on their way to the lanes of a warp.
struct Ring {
  const char *next;  // what this lane copies next; another's channels, eight at a time
  i64 stride;        // bytes between rows
  char *to;          // this lane's place in the first slot
  const char *from;  // where it reads its pair of channels
  bool inside;

  __device__ Ring(const Place &p, const Args &a, const void *base, i64 b, i64 t, char *memory)
      : stride(t * (i64)sizeof(scalar)), from(memory + p.lane * sizeof(pair)) {
    constexpr int LANES = 32 / TOGETHER, WIDE = 16 / sizeof(scalar);
    const i64 d = p.d - 2 * p.lane + p.lane % LANES * WIDE;
    inside = d < a.D;
    next = (const char *)base + (p.b * b + (p.start + p.lane / LANES) * t + d) * (i64)sizeof(scalar);
    to = memory + p.lane * 16;
  }

  // Starts the copy of the next stage, of which ``left`` rows exist; the others are zeros.
  __device__ void fetch(int slot, int left, int lane) {
#pragma unroll
    for (int c = 0; c < COPIES; c++) {
      const int row = lane / (32 / TOGETHER) + c * TOGETHER;
      const int bytes = inside && row < left ? 16 : 0;
      copy_16(to + slot * STAGE + c * 512, next + c * TOGETHER * stride, bytes);
    }
    next += R * stride;
  }

  __device__ float2 row(int slot, int r) const {
    return widen(*reinterpret_cast<const pair *>(from + slot * STAGE + r * LINE));
  }
};

// Waits until the oldest stage is there for all lanes, and none reads the one before it.
__device__ void await() {
  await_copies<SLOTS - 2>();
  __syncwarp();
}

// The P rows before ``start``; zeros before the first.
__device__ void look_back(const Args &a, const Place &p, const void *x, float2 (&past)[P]) {
#pragma unroll
  for (int j = 0; j < P; j++) {
    const i64 t = p.start - P + j;
    past[j] = make_float2(0.f, 0.f);
    if (p.inside && t >= 0 && t < a.L)
      past[j] = widen(*reinterpret_cast<const pair *>((const char *)x + p.offset(t, a.x_b, a.x_t)));
  }
}

struct Taps {
  float2 weight[W], bias;

  __device__ Taps(const Args &a, const Place &p) : bias(make_float2(0.f, 0.f)) {
#pragma unroll
    for (int w = 0; w < W; w++) {
      weight[w] = make_float2(0.f, 0.f);
      if (p.inside) weight[w] = make_float2(a.weight[p.d * W + w], a.weight[(p.d + 1) * W + w]);
    }
    if (p.inside && a.bias) bias = make_float2(a.bias[p.d], a.bias[p.d + 1]);
  }

  // bias + sum_w weight_w x_w
  __device__ float2 sum(const float2 *x) const {
    float2 z = bias;
#pragma unroll
    for (int w = 0; w < W; w++) z = fma2(weight[w], x[w], z);
    return z;
  }
};

// --- forward ---------------------------------------------------------------------------

// R rows of outputs, of which the first ``there`` exist; all of them where WHOLE.
template <bool WHOLE>
__device__ void outputs(const Taps &taps, const Ring &ring, int slot, float2 (&past)[P],
                        char *to, i64 stride, int there) {
  float2 x[P + R];
#pragma unroll
  for (int j = 0; j < P; j++) x[j] = past[j];
#pragma unroll
  for (int r = 0; r < R; r++) x[P + r] = ring.row(slot, r);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float2 z = taps.sum(x + r);
#if SILU
    z.x *= sigmoid(z.x), z.y *= sigmoid(z.y);
#endif
    if (WHOLE || r < there) *reinterpret_cast<pair *>(to + r * stride) = narrow(z);
  }
#pragma unroll
  for (int j = 0; j < P; j++) past[j] = x[R + j];
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const __grid_constant__ Args a) {
  extern __shared__ float4 shared[];
  const Place p(a);
  if (p.left == 0) return;
  Ring ring(p, a, a.x, a.x_b, a.x_t, (char *)shared + p.warp * SLOTS * STAGE);
#pragma unroll
  for (int s = 0; s < SLOTS - 1; s++) ring.fetch(s, p.left - s * R, p.lane), commit_copies();
  float2 past[P];
  look_back(a, p, a.x, past);
  const Taps taps(a, p);
  const i64 stride = a.D * (i64)sizeof(scalar);
  char *to = (char *)a.y + p.offset(p.start, a.L * a.D, a.D);
  for (int i = 0; i < p.left; i += SLOTS * R) {
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
      const int here = p.left - i - s * R;
      if (here <= 0) break;
      await();
      ring.fetch((s + SLOTS - 1) % SLOTS, here - (SLOTS - 1) * R, p.lane);
      commit_copies();
      if (here >= R && p.inside) outputs<true>(taps, ring, s, past, to, stride, R);
      else outputs<false>(taps, ring, s, past, to, stride, p.inside ? here : 0);
      to += R * stride;
    }
  }
  if (p.start + p.left < a.L || !p.inside) return;
#pragma unroll
  for (int j = 0; j < P; j++) {  // the state: inputs as they came, zeros before the first
    const i64 t = a.L - P + j;
    pair kept = narrow(make_float2(0.f, 0.f));
    if (t >= 0) kept = *reinterpret_cast<const pair *>((const char *)a.x + p.offset(t, a.x_b, a.x_t));
    *reinterpret_cast<pair *>((char *)a.final + p.offset(j, P * a.D, a.D)) = kept;
  }
}

// --- backward --------------------------------------------------------------------------

// R rows of g from row ``t`` of the warp on, and what they complete: dx of the rows from
// t - P on. WHOLE: those all exist and are the warp's own, and so are the rows of g.
template <bool WHOLE>
__device__ void gradients(const Args &a, const Place &p, const Taps &taps, const Ring &xs,
                          const Ring &dys, int slot, int t, float2 (&past)[P],
                          float2 (&before)[P], Sums &sums, char *to, i64 stride) {
  float2 x[P + R], g[P + R];
#pragma unroll
  for (int j = 0; j < P; j++) x[j] = past[j], g[j] = before[j];
#pragma unroll
  for (int r = 0; r < R; r++) x[P + r] = xs.row(slot, r), g[P + r] = dys.row(slot, r);
#pragma unroll
  for (int r = 0; r < R; r++) {
#if SILU
    const float2 z = taps.sum(x + r);
    g[P + r].x *= silu_slope(z.x), g[P + r].y *= silu_slope(z.y);
#endif
    if (WHOLE || t + r < p.left) {
      const float2 own = g[P + r];
#pragma unroll
      for (int w = 0; w < W; w++) sums.of[w] = fma2(own, x[r + w], sums.of[w]);
      sums.of[W].x += own.x, sums.of[W].y += own.y;
    }
    float2 value = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < W; w++) value = fma2(taps.weight[P - w], g[r + w], value);
    const int row = t + r - P;  // of the warp's
    if (!WHOLE && p.inside && row >= 0 && row < p.left && a.dfinal) {
      const i64 kept = p.start + row - (a.L - P);
      if (kept >= 0) {
        const char *at = (const char *)a.dfinal + p.offset(kept, P * a.D, a.D);
        const float2 more = widen(*reinterpret_cast<const pair *>(at));
        value.x += more.x, value.y += more.y;
      }
    }
    if (WHOLE || (p.inside && row >= 0 && row < p.left))
      *reinterpret_cast<pair *>(to + (r - P) * stride) = narrow(value);
  }
#pragma unroll
  for (int j = 0; j < P; j++) past[j] = x[R + j], before[j] = g[R + j];
}

// The sums of the block's warps, added up and left as its share.
__device__ void share(const Args &a, const Place &p, const Sums &sums) {
  extern __shared__ float4 shared[];
  float2(*all)[W + 1][32] = (float2(*)[W + 1][32])shared;
  await_copies<0>();  // no copy comes to the rings any more, and all have read theirs
  __syncthreads();
#pragma unroll
  for (int w = 0; w <= W; w++) all[p.warp][w][p.lane] = sums.of[w];
  __syncthreads();
  for (int w = p.warp; w <= W; w += WARPS) {
    float2 total = all[0][w][p.lane];
#pragma unroll
    for (int i = 1; i < WARPS; i++) total.x += all[i][w][p.lane].x, total.y += all[i][w][p.lane].y;
    if (p.inside)
      *reinterpret_cast<float2 *>(a.shares + (p.share * (W + 1) + w) * a.D + p.d) = total;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const __grid_constant__ Args a) {
  extern __shared__ float4 shared[];
  const Place p(a);
  Sums sums = {};
  if (p.left > 0) {
    char *memory = (char *)shared + p.warp * 2 * SLOTS * STAGE;
    Ring xs(p, a, a.x, a.x_b, a.x_t, memory);
    Ring dys(p, a, a.dy, a.dy_b, a.dy_t, memory + SLOTS * STAGE);
    // rows that there are of those that it goes through: its own, and P beyond
    const int ahead = (int)min(a.L - p.start, (i64)p.left + P);
#pragma unroll
    for (int s = 0; s < SLOTS - 1; s++) {
      xs.fetch(s, ahead - s * R, p.lane), dys.fetch(s, ahead - s * R, p.lane);
      commit_copies();
    }
    float2 past[P], before[P] = {};
    look_back(a, p, a.x, past);
    const Taps taps(a, p);
    const i64 stride = a.D * (i64)sizeof(scalar);
    char *to = (char *)a.dx + p.offset(p.start, a.L * a.D, a.D);
    // stages from here on have a row that is not this warp's, or takes dfinal
    const i64 plain = min((i64)p.left, a.L - p.start - P);
    for (int i = 0; i < p.left + P; i += SLOTS * R) {
#pragma unroll
      for (int s = 0; s < SLOTS; s++) {
        const int t = i + s * R;
        if (t >= p.left + P) break;
        await();
        const int rest = ahead - t - (SLOTS - 1) * R;
        xs.fetch((s + SLOTS - 1) % SLOTS, rest, p.lane);
        dys.fetch((s + SLOTS - 1) % SLOTS, rest, p.lane);
        commit_copies();
        if (t > 0 && t + R <= plain && p.inside)
          gradients<true>(a, p, taps, xs, dys, s, t, past, before, sums, to, stride);
        else
          gradients<false>(a, p, taps, xs, dys, s, t, past, before, sums, to, stride);
        to += R * stride;
      }
    }
  }
  share(a, p, sums);
}

// dweight and dbias: the shares of all n blocks, in a fixed order.
extern "C" __global__ void add_up(const __grid_constant__ Args a) {
  extern __shared__ float4 shared[];
  float(*all)[32] = (float(*)[32])shared;
  const unsigned D = (unsigned)a.D, size = (W + 1) * D;
  const unsigned i = blockIdx.x * 32 + threadIdx.x % 32;
  const int part = threadIdx.x / 32;
  float total = 0.f;
  if (i < size)
#pragma unroll 8
    for (i64 k = part; k < a.n; k += PARTS) total += a.shares[k * (i64)size + i];
  all[part][threadIdx.x % 32] = total;
  __syncthreads();
  if (part > 0 || i >= size) return;
#pragma unroll
  for (int k = 1; k < PARTS; k++) total += all[k][threadIdx.x];
  const unsigned w = i / D, d = i % D;
  if (w < W) a.dweight[(i64)d * W + w] = total;
  else if (a.dbias) a.dbias[d] = total;
}
