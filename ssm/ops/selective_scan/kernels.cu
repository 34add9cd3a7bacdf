// The selective scan, forward and backward, for NVIDIA GPUs; compiled at run time.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = (C_t h_t + D u_t) silu(z_t)
//
// A warp owns 32 / LN * CH channels: LN lanes share a channel's states (NS each; those of
// SPLIT warps together are all), a lane keeps CH channels, and nothing of the state leaves
// its registers. Tiles of Q steps are staged in shared memory in float32: what depends on
// (t, d) alone (softplus, delta u, the gate) is computed there once, not once a state.
//
// Time may be cut into segments that run side by side: a first kernel finds what each
// segment does to a state of zero, and a segment then starts from what those before it
// leave. The decay of a whole segment is exp(A sum(delta)): it costs one exponential.
//
// Sums over lanes exchange halves: after log2(R) rounds each of R lanes holds the total
// of V / R values, at the price of one shuffle a value. Sums over warps and blocks are
// added in a fixed order: two runs agree in every bit.
//
// Defined before this file: what common.cu has; PAIRED, all rows begin at even places;
// GATED, there is a z; SOFTPLUS; NS, LN, CH, SPLIT, WARPS; FORWARD or BACKWARD, as the blocks
// wanted on a multiprocessor; Q, the steps of a tile; KEEP, the steps between the states
// that are kept. Forward: LOCAL, UNROLL (of the loop over steps). Backward
// (Q is KEEP): T, the steps whose states are in registers; DECAYS, their decays are too;
// FLUSH, the steps whose dB and dC wait in shared memory for the other warps.

constexpr int THREADS = 32 * WARPS;
constexpr int CG = 32 / LN;                // groups of lanes in a warp
constexpr int ROWS_D = WARPS / SPLIT;      // warps side by side in channels
constexpr int BLOCK_D = ROWS_D * CG * CH;  // channels of a block
constexpr int PAIRS = BLOCK_D / 2;
constexpr int NP = NS * LN * SPLIT;        // states, padded
constexpr int VN = NS < 4 ? NS : 4;        // neighbouring states of a lane
constexpr int E = CH * NS;                 // state elements of a thread
constexpr int ROWS = THREADS / PAIRS;      // rows staged at once
constexpr int ITEMS = Q / ROWS;
constexpr int BC_ITEMS = Q * NP / 2 / THREADS;
[[maybe_unused]] constexpr float LN2 = 0.69314718055994530942f;

static_assert(THREADS % PAIRS == 0 && Q % ROWS == 0, "a thread stages one pair");

// Every field has eight bytes: the host packs them without gaps.
struct Args {
  const void *u, *delta, *z, *B, *C, *dy;
  const float *A, *D, *bias, *h0, *dfinal;
  const i64 *lengths;
  void *y;
  float *final, *starts;  // the state after the last step; those before every KEEP steps
  void *du, *ddelta, *dz, *dB, *dC;
  float *dA, *dD, *dbias, *dh0;
  float *partial, *dA_rows, *dD_rows, *dbias_rows;  // sums of blocks
  float *ends, *sums;  // of each segment from a zero state: its end; its sum of delta
  i64 u_b, u_t, delta_b, delta_t, z_b, z_t, B_b, B_t, B_g, C_b, C_t, C_g, dy_b, dy_t;
  i64 rows, L, channels, N, groups, segment, segments;
};

// log(1 + e^x), x itself above 20. log(1 + e) = 2 artanh(e / (2 + e)) keeps the digits of
// small steps; the polynomial in s^2 <= 1/9 has a relative error of 5e-9.
__device__ float softplus(float x) {
  float e = exp2_(-LOG2E * fabsf(x));
  float s = e * inverse(2.f + e), q = s * s;
  float p = 0.14005996f;
  p = fmaf(p, q, 0.14000902f);
  p = fmaf(p, q, 0.20010764f);
  p = fmaf(p, q, 0.33333208f);
  p = fmaf(p, q, 1.f);
  return x > 20.f ? x : fmaxf(x, 0.f) + 2.f * s * p;
}

// The same, and its slope 1 / (1 + e^-x).
__device__ float softplus(float x, float &slope) {
  const float e = exp2_(-LOG2E * fabsf(x)), one = 1.f + e, two = 2.f + e;
  const float i = inverse(one * two), s = e * (i * one), q = s * s;
  float p = 0.14005996f;
  p = fmaf(p, q, 0.14000902f);
  p = fmaf(p, q, 0.20010764f);
  p = fmaf(p, q, 0.33333208f);
  p = fmaf(p, q, 1.f);
  slope = x > 20.f ? 1.f : (x < 0.f ? e : 1.f) * (i * two);
  return x > 20.f ? x : fmaxf(x, 0.f) + 2.f * s * p;
}

// --- memory ----------------------------------------------------------------------------

__device__ pair load_pair(const char *at) {
#if PAIRED
  return *reinterpret_cast<const pair *>(at);
#else
  const scalar *x = reinterpret_cast<const scalar *>(at);
  return narrow(make_float2(widen(x[0]), widen(x[1])));  // exact: these were such numbers
#endif
}

__device__ void store_pair(char *at, float2 x) {
#if PAIRED
  *reinterpret_cast<pair *>(at) = narrow(x);
#else
  reinterpret_cast<scalar *>(at)[0] = narrow(x.x);
  reinterpret_cast<scalar *>(at)[1] = narrow(x.y);
#endif
}

// The first ``there`` numbers of a pair (zeros for the rest), and the inverse.
__device__ pair load_some(const char *at, int there) {
  const scalar *x = reinterpret_cast<const scalar *>(at);
  return narrow(make_float2(there > 0 ? widen(x[0]) : 0.f, there > 1 ? widen(x[1]) : 0.f));
}

__device__ void store_some(char *at, float2 x, int there) {
  if (there > 0) reinterpret_cast<scalar *>(at)[0] = narrow(x.x);
  if (there > 1) reinterpret_cast<scalar *>(at)[1] = narrow(x.y);
}

template <int V>
__device__ void read(const float *from, float *to) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      float4 x = *reinterpret_cast<const float4 *>(from + i);
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
  } else if constexpr (V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      float2 x = *reinterpret_cast<const float2 *>(from + i);
      to[i] = x.x, to[i + 1] = x.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = from[i];
  }
}

template <int V>
__device__ void write(float *to, const float *from) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4)
      *reinterpret_cast<float4 *>(to + i) =
          make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
  } else if constexpr (V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2)
      *reinterpret_cast<float2 *>(to + i) = make_float2(from[i], from[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = from[i];
  }
}

// The block's place among rows, segments and channels; the thread's among its channels.
struct Place {
  i64 b, segment, group, begin, end, length;
  i64 d0;            // the block's first channel
  int within, limit; // its place in its group, and how many channels it has
  int lane, warp, ln, cg, c0;

  __device__ explicit Place(const Args &a) {
    const i64 size = a.channels / a.groups;
    const i64 blocks = (size + BLOCK_D - 1) / BLOCK_D;
    i64 i = blockIdx.x;
    const i64 part = i % blocks;
    i /= blocks;
    group = i % a.groups;
    i /= a.groups;
    segment = i % a.segments;
    b = i / a.segments;
    begin = segment * a.segment;
    end = min(begin + a.segment, a.L);
    length = a.lengths ? min(a.lengths[b], a.L) : a.L;
    within = (int)part;
    d0 = group * size + part * BLOCK_D;
    limit = (int)min((i64)BLOCK_D, size - part * BLOCK_D);
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    ln = lane % LN;
    cg = lane / LN;
    c0 = (warp / SPLIT * CG + cg) * CH;
  }

  // The state that element j of this lane is.
  __device__ int state(int j) const { return state() + (j / VN) * (VN * LN) + j % VN; }
  __device__ int state() const { return warp % SPLIT * (NS * LN) + ln * VN; }
};

// Elements (channel, state) of an array (channels, N) that are this thread's.
__device__ void load_states(const float *from, const Place &p, int N, float (&to)[CH][NS]) {
#pragma unroll
  for (int c = 0; c < CH; c++)
#pragma unroll
    for (int j = 0; j < NS; j++) {
      const int n = p.state(j);
      to[c][j] = p.c0 + c < p.limit && n < N ? from[(p.d0 + p.c0 + c) * N + n] : 0.f;
    }
}

__device__ void store_states(float *to, const Place &p, int N, const float (&from)[CH][NS]) {
#pragma unroll
  for (int c = 0; c < CH; c++)
#pragma unroll
    for (int j = 0; j < NS; j++) {
      const int n = p.state(j);
      if (p.c0 + c < p.limit && n < N) to[(p.d0 + p.c0 + c) * N + n] = from[c][j];
    }
}

__device__ void scale(float (&x)[CH][NS], float factor) {
#pragma unroll
  for (int c = 0; c < CH; c++)
#pragma unroll
    for (int j = 0; j < NS; j++) x[c][j] *= factor;
}

// A pair of columns of an array (time, columns), WIDE pairs side by side, as one thread
// sees it: it takes every ROWS-th row, and ``there`` of the two columns exist.
template <int WIDE, int ITEMS>
struct Columns {
  static constexpr int ROWS = THREADS / WIDE;
  char *at;     // of row 0
  int stride;   // bytes between rows; the host sees to it that they are few
  int there;

  __device__ Columns() {}
  __device__ Columns(const void *base, i64 offset, i64 stride, int columns)
      : stride((int)(stride * sizeof(scalar))), there(columns - column()) {
    at = (char *)base + (offset + column()) * sizeof(scalar);
  }

  __device__ static int column() { return threadIdx.x % WIDE * 2; }
  __device__ static int row(int k) { return threadIdx.x / WIDE + k * ROWS; }
  __device__ char *item(i64 t) const { return at + (t + row(0)) * stride; }

  // WHOLE: all of the tile from step t on exists; else rows from ``end`` on are zeros.
  template <bool WHOLE>
  __device__ void load(i64 t, i64 end, pair (&to)[ITEMS]) const {
    const char *from = item(t);
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const char *place = from + (i64)stride * (k * ROWS);
      to[k] = WHOLE ? load_pair(place) : load_some(place, t + row(k) < end ? there : 0);
    }
  }

  template <bool WHOLE>
  __device__ void store(i64 t, i64 end, int k, float2 x) const {
    char *place = item(t) + (i64)stride * (k * ROWS);
    if (WHOLE) store_pair(place, x);
    else store_some(place, x, t + row(k) < end ? there : 0);
  }
};

typedef Columns<PAIRS, ITEMS> Channels;
typedef Columns<NP / 2, BC_ITEMS> States;
static_assert(THREADS % (NP / 2) == 0 && Q * NP / 2 % THREADS == 0, "no thread is idle");

// To shared memory, where TOGETHER rows alternate pair by pair.
template <int TOGETHER>
__device__ void keep(const pair (&raw)[BC_ITEMS], float *to) {
#pragma unroll
  for (int k = 0; k < BC_ITEMS; k++) {
    const int row = States::row(k), in_row = States::column() / 2;
    const int place = (row / TOGETHER * (NP / 2) + in_row) * TOGETHER + row % TOGETHER;
    reinterpret_cast<float2 *>(to)[TOGETHER > 1 ? place : threadIdx.x + k * THREADS] =
        widen(raw[k]);
  }
}

// A vector over channels at this thread's pair; zeros where it is not given.
__device__ float2 at_pair(const float *vector, const Place &p) {
  const int place = threadIdx.x % PAIRS * 2;
  float2 r = make_float2(0.f, 0.f);
  if (vector && place < p.limit) r.x = vector[p.d0 + place];
  if (vector && place + 1 < p.limit) r.y = vector[p.d0 + place + 1];
  return r;
}

__device__ float2 step_size(float2 x, float2 bias) {
  x.x += bias.x, x.y += bias.y;
#if SOFTPLUS
  x.x = softplus(x.x), x.y = softplus(x.y);
#endif
  return x;
}

// --- sums over lanes -------------------------------------------------------------------

// v summed over R lanes, MASK the distance of the nearest two. Of max(1, V / R) totals
// that a lane then has, the first is number first_total(...) of the V.
template <int V, int R, int MASK>
__device__ void sum_lanes(float *v) {
  if constexpr (R > 1) {
    constexpr int M = MASK * R / 2;
    if constexpr (V > 1) {
      const bool upper = threadIdx.x & M;
#pragma unroll
      for (int i = 0; i < V / 2; i++) {
        const float send = upper ? v[i] : v[i + V / 2];
        const float own = upper ? v[i + V / 2] : v[i];
        v[i] = own + __shfl_xor_sync(~0u, send, M);
      }
      sum_lanes<V / 2, R / 2, MASK>(v);
    } else {
      v[0] += __shfl_xor_sync(~0u, v[0], M);
      sum_lanes<1, R / 2, MASK>(v);
    }
  }
}

template <int V, int R>
__device__ int first_total(int place) {
  return V >= R ? place * (V / R) : place / (R / V);
}

// Every total is held by V < R ? R / V lanes; one of them may write it.
template <int V, int R>
__device__ bool holds_total(int place) {
  return V >= R || place % (R / V) == 0;
}

// The state before this segment: earlier segments, one after another, from h0.
__device__ void state_before(const Args &a, const Place &p, const float (&A2)[CH][NS],
                             float (&h)[CH][NS]) {
  const i64 size = a.channels * a.N;
  if (a.h0) load_states(a.h0 + p.b * size, p, a.N, h);
  for (i64 s = 0; s < p.segment; s++) {
    const i64 i = p.b * a.segments + s;
    float end[CH][NS];
    load_states(a.ends + i * size, p, a.N, end);
#pragma unroll
    for (int c = 0; c < CH; c++) {
      const float sum = p.c0 + c < p.limit ? a.sums[i * a.channels + p.d0 + p.c0 + c] : 0.f;
#pragma unroll
      for (int j = 0; j < NS; j++) h[c][j] = fmaf(exp2_(A2[c][j] * sum), h[c][j], end[c][j]);
    }
  }
}

__device__ void store_sums(const Args &a, const Place &p, const float (&total)[CH]) {
  const i64 i = p.b * a.segments + p.segment;
#pragma unroll
  for (int c = 0; c < CH; c++)
    if (p.ln == 0 && p.c0 + c < p.limit)
      a.sums[i * a.channels + p.d0 + p.c0 + c] = total[c];
}

// --- forward ---------------------------------------------------------------------------

#ifdef FORWARD
constexpr int TS = LN / CH < 1 ? 1 : LN / CH > 4 ? 4 : LN / CH;  // steps summed together
// A load from shared memory takes up to 16 bytes: a lane that needs 8 of a step finds two
// steps side by side.
constexpr int SIDE = NS == 2 && CH == 1 && TS > 1 ? 2 : 1;
constexpr int PART = Q < KEEP ? Q : KEEP;  // steps between states that may be kept
// Eight lanes leave their parts of y side by side, to be added when it is written out:
// shuffles would cost more. YS: numbers of a row, which also spreads rows over banks.
static_assert(SPLIT == 1, "forward, a warp has all states");
constexpr bool APART = LN == 8 && CH == 1;
constexpr int YS = APART ? BLOCK_D * LN : BLOCK_D + (BLOCK_D % 32 ? 0 : 16);

// The thread's part of a tile: pointers to its channels and states.
struct Lane {
  const float *step, *b_row, *c_row;
};

// TS steps in registers.
struct Group {
  float d[TS * CH * 2], B[TS * NS], C[TS * NS];

  __device__ void load(const Lane &lane, int s) {
#pragma unroll
    for (int i = 0; i < TS; i += SIDE)
      read<SIDE * CH * 2>(lane.step + (s + i) * 2 * BLOCK_D, d + i * CH * 2);
#pragma unroll
    for (int i = 0; i < TS; i += SIDE)
#pragma unroll
      for (int j = 0; j < NS; j += VN) {
        read<SIDE * VN>(lane.b_row + (s + i) * NP + j * LN, B + i * NS + j);
#if !LOCAL
        read<SIDE * VN>(lane.c_row + (s + i) * NP + j * LN, C + i * NS + j);
#endif
      }
  }

  __device__ float delta(int i, int c) const { return d[(i * CH + c) * 2]; }
  __device__ float delta_u(int i, int c) const { return d[(i * CH + c) * 2 + 1]; }

  __device__ void decays(const float (&A2)[CH][NS], float (&to)[TS][CH][NS]) const {
#pragma unroll
    for (int i = 0; i < TS; i++)
#pragma unroll
      for (int c = 0; c < CH; c++)
#pragma unroll
        for (int j = 0; j < NS; j++) to[i][c][j] = exp2_(delta(i, c) * A2[c][j]);
  }

  __device__ void advance(const float (&decay)[TS][CH][NS], float (&h)[CH][NS],
                          float (&y)[TS * CH]) const {
#pragma unroll
    for (int i = 0; i < TS; i++)
#pragma unroll
      for (int c = 0; c < CH; c++) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < NS; j++) {
          h[c][j] = fmaf(decay[i][c][j], h[c][j], delta_u(i, c) * B[i * NS + j]);
#if !LOCAL
          sum = fmaf(C[i * NS + j], h[c][j], sum);
#endif
        }
        y[i * CH + c] = sum;
      }
  }

  __device__ void add_steps(float (&total)[CH]) const {
#pragma unroll
    for (int i = 0; i < TS; i++)
#pragma unroll
      for (int c = 0; c < CH; c++) total[c] += delta(i, c);
  }
};

// The arrays in shared memory.
struct Tile {
  float4 *steps;   // (Q / SIDE, BLOCK_D, SIDE): delta, delta u
  float *Bs, *Cs;  // (Q / SIDE, NP / VN, SIDE, VN)
  float *ys;       // (Q, YS)

  __device__ explicit Tile(float4 *shared) {
    steps = shared;
    Bs = reinterpret_cast<float *>(steps + Q * PAIRS);
    Cs = Bs + Q * NP;
    ys = Cs + Q * NP;
  }
};

// Where four lanes' parts of y begin: two such fours for each of a pair's channels, in an
// order by which neither those who write nor those who read meet in a bank.
__device__ int part_of_output(int pair, int four) { return (pair * 4 + (four ^ pair / 2 % 4)) * 4; }

// y of the pair of channels that begins with ``channel``.
__device__ float2 output(const float *row, int channel) {
  if constexpr (!APART) return *reinterpret_cast<const float2 *>(row + channel);
  float fours[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float part[4];
    read<4>(row + part_of_output(channel / 2, i), part);
    fours[i] = (part[0] + part[1]) + (part[2] + part[3]);
  }
  return make_float2(fours[0] + fours[1], fours[2] + fours[3]);
}

// The inputs of one tile in registers, on their way to shared memory.
struct Raw {
  pair u[ITEMS], delta[ITEMS], z[ITEMS], B[BC_ITEMS], C[BC_ITEMS];
};

// The inputs and the output as this thread reads and writes them.
struct Streams {
  Channels u, delta, z, y;
  States B, C;
  float2 bias, D;
  i64 valid, end;
  bool even;

  __device__ Streams(const Args &a, const Place &p) {
    u = Channels(a.u, p.b * a.u_b + p.d0, a.u_t, p.limit);
    delta = Channels(a.delta, p.b * a.delta_b + p.d0, a.delta_t, p.limit);
    B = States(a.B, p.b * a.B_b + p.group * a.B_g, a.B_t, a.N);
#if !LOCAL
    C = States(a.C, p.b * a.C_b + p.group * a.C_g, a.C_t, a.N);
    y = Channels(a.y, p.b * a.L * a.channels + p.d0, a.channels, p.limit);
#if GATED
    z = Channels(a.z, p.b * a.z_b + p.d0, a.z_t, p.limit);
#endif
#endif
    bias = at_pair(a.bias, p), D = at_pair(a.D, p);
    valid = min(p.length, p.end), end = p.end;
    even = p.limit == BLOCK_D && a.N == NP;
  }

  __device__ bool whole(i64 t) const { return even && t + Q <= valid; }

  template <bool WHOLE>
  __device__ void load(i64 t, Raw &to) const {
    u.load<WHOLE>(t, valid, to.u);
    delta.load<WHOLE>(t, valid, to.delta);
    B.load<WHOLE>(t, valid, to.B);
#if !LOCAL
    C.load<WHOLE>(t, valid, to.C);
#if GATED
    z.load<WHOLE>(t, valid, to.z);
#endif
#endif
  }

  template <bool WHOLE>
  __device__ void stage(i64 t, const Raw &raw, const Tile &tile) const {
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const float2 x = widen(raw.u[k]);
      float2 d = step_size(widen(raw.delta[k]), bias);
      if (!WHOLE && t + u.row(k) >= valid) d = make_float2(0.f, 0.f);
      if constexpr (SIDE == 2) {
        const int row = u.row(k), place = row / 2 * BLOCK_D + u.column();
        float2 *to = reinterpret_cast<float2 *>(tile.steps) + place * 2 + row % 2;
        to[0] = make_float2(d.x, d.x * x.x), to[2] = make_float2(d.y, d.y * x.y);
      } else {
        tile.steps[threadIdx.x + k * THREADS] = make_float4(d.x, d.x * x.x, d.y, d.y * x.y);
      }
    }
    keep<SIDE>(raw.B, tile.Bs);
#if !LOCAL
    keep<SIDE>(raw.C, tile.Cs);
#endif
  }

  // Skip and gate, and to memory; u and z are those of this tile.
  template <bool WHOLE>
  __device__ void finish(i64 t, const pair (&us)[ITEMS], const pair (&zs)[ITEMS],
                         const Tile &tile) const {
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      float2 out = output(tile.ys + u.row(k) * YS, u.column());
      const float2 x = widen(us[k]);
      out.x = fmaf(D.x, x.x, out.x), out.y = fmaf(D.y, x.y, out.y);
#if GATED
      const float2 gate = widen(zs[k]);
      out.x *= gate.x * sigmoid(gate.x), out.y *= gate.y * sigmoid(gate.y);
#endif
      if (!WHOLE && t + u.row(k) >= valid) out = make_float2(0.f, 0.f);
      y.store<WHOLE>(t, end, k, out);
    }
  }
};

// Outputs of TS steps to shared memory, summed over the lanes of a channel if not APART.
__device__ void put_outputs(const Place &p, int s, float (&y)[TS * CH], float *ys) {
  if constexpr (APART) {
    const int part = part_of_output(p.c0 / 2, p.c0 % 2 * 2 + p.ln / 4) + p.ln % 4;
#pragma unroll
    for (int i = 0; i < TS; i++) ys[(s + i) * YS + part] = y[i];
    return;
  }
  sum_lanes<TS * CH, LN, 1>(y);
  if (!holds_total<TS * CH, LN>(p.ln)) return;
  const int first = first_total<TS * CH, LN>(p.ln);
#pragma unroll
  for (int i = 0; i < (TS * CH + LN - 1) / LN; i++)
    ys[(s + (first + i) / CH) * YS + p.c0 + (first + i) % CH] = y[i];
}

// PART steps of a tile from step ``begin`` on, for the states of this thread; of those
// from ``end`` on, which there are none of, only what shares a round of the loop.
__device__ void advance(const Tile &tile, const Place &p, int begin, i64 end,
                        const float (&A2)[CH][NS], float (&h)[CH][NS], float (&total)[CH]) {
  constexpr int ROUND = UNROLL * TS;
  static_assert(PART % ROUND == 0, "rounds fill a part");
  const Lane lane = {reinterpret_cast<const float *>(tile.steps) + SIDE * 2 * p.c0,
                     tile.Bs + p.ln * SIDE * VN, tile.Cs + p.ln * SIDE * VN};
  Group now;
  float decay[TS][CH][NS];
  for (int round = begin; round < begin + PART && round < end; round += ROUND)
#pragma unroll
    for (int s = round; s < round + ROUND; s += TS) {
      now.load(lane, s);
      now.decays(A2, decay);
      float y[TS * CH];
      now.advance(decay, h, y);
#if LOCAL
      now.add_steps(total);
#else
      put_outputs(p, s, y, tile.ys);
#endif
    }
}

// LOCAL: only what a segment does to a state of zero.
extern "C" __global__ void __launch_bounds__(THREADS, FORWARD)
scan(const __grid_constant__ Args a) {
  extern __shared__ float4 shared[];
  const Tile tile(shared);
  const Place p(a);
  const Streams streams(a, p);
  const i64 size = a.channels * a.N, chunks = (a.L + KEEP - 1) / KEEP;
  float A2[CH][NS], h[CH][NS] = {}, total[CH] = {};
  load_states(a.A, p, a.N, A2);
  scale(A2, LOG2E);
#if !LOCAL
  state_before(a, p, A2, h);
#endif

  Raw raw;
  if (streams.whole(p.begin)) streams.load<true>(p.begin, raw);
  else streams.load<false>(p.begin, raw);
  for (i64 t = p.begin; t < p.end; t += Q) {
    const bool whole = streams.whole(t);
    if (whole) streams.stage<true>(t, raw, tile);
    else streams.stage<false>(t, raw, tile);
    pair us[ITEMS], zs[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; k++) us[k] = raw.u[k], zs[k] = raw.z[k];
    __syncthreads();
    if (t + Q < p.end) {  // in flight while this tile is computed
      if (streams.whole(t + Q)) streams.load<true>(t + Q, raw);
      else streams.load<false>(t + Q, raw);
    }
#pragma unroll 1
    for (int s = 0; s < Q; s += PART) {
      const i64 now = t + s;
      if (!LOCAL && a.starts && now % KEEP == 0 && now < p.end)
        store_states(a.starts + (p.b * chunks + now / KEEP) * size, p, a.N, h);
      advance(tile, p, s, p.end - t, A2, h, total);
    }
    __syncthreads();
    if (LOCAL) continue;
    if (whole) streams.finish<true>(t, us, zs, tile);
    else streams.finish<false>(t, us, zs, tile);
  }
#if LOCAL
  store_states(a.ends + (p.b * a.segments + p.segment) * size, p, a.N, h);
  store_sums(a, p, total);
#else
  if (p.segment == a.segments - 1) store_states(a.final + p.b * size, p, a.N, h);
#endif
}
#endif

// --- backward --------------------------------------------------------------------------

// With g_t what reaches h_t from all later times, and dyg_t = dy_t silu(z_t):
//
//     g_t = C_t dyg_t + a_{t+1} g_{t+1},   a_t = exp(delta_t A),
//     dB_t = g_t delta_t u_t,   dC_t = dyg_t h_t,   both summed over channels,
//     dA = sum_t g_t a_t h_{t-1} delta_t,
//     du_t = delta_t (g_t . B_t) + D dyg_t,
//     ddelta_t = u_t (g_t . B_t) + (g_t a_t h_{t-1}) . A.

#ifdef BACKWARD
constexpr int SUBS = Q / T;
constexpr int TS = LN / CH < 1 ? 1 : LN / CH > 2 ? 2 : LN / CH;

// Shared memory of the backward kernels: rows of a tile.
struct Tile {
  float4 *steps;  // (Q, PAIRS): delta, delta u of two channels
  float2 *gated;  // (Q, PAIRS): dyg
  float *Bs, *Cs;  // (Q, NP)
  float *matrix_sums;  // (ROWS_D, FLUSH, 2, NP)
  float *stash;        // (SUBS - 1, E / VN, THREADS, VN)
  // Sums over the states of one warp, (SPLIT, Q, PAIRS). They take the place of the step's
  // inputs, which no lane needs any more, unless another warp may.
  float4 *sums;  // g . B, (g a h) . A
  float2 *outs;  // C h

  __device__ explicit Tile(float4 *shared) {
    steps = shared;
    gated = reinterpret_cast<float2 *>(steps + Q * PAIRS);
    Bs = reinterpret_cast<float *>(gated + Q * PAIRS);
    Cs = Bs + Q * NP;
    matrix_sums = Cs + Q * NP;
    stash = matrix_sums + ROWS_D * FLUSH * 2 * NP;
    float *rest = stash + (SUBS - 1) * E * THREADS;
    sums = SPLIT == 1 ? steps : reinterpret_cast<float4 *>(rest);
    outs = SPLIT == 1 ? gated : reinterpret_cast<float2 *>(sums + SPLIT * Q * PAIRS);
  }
};

// The inputs, as this thread reads them.
struct Sources {
  Channels u, delta, dy, z;
  States B, C;
  i64 valid;
  bool even;
  float2 bias;

  __device__ Sources(const Args &a, const Place &p) {
    u = Channels(a.u, p.b * a.u_b + p.d0, a.u_t, p.limit);
    delta = Channels(a.delta, p.b * a.delta_b + p.d0, a.delta_t, p.limit);
    dy = Channels(a.dy, p.b * a.dy_b + p.d0, a.dy_t, p.limit);
#if GATED
    z = Channels(a.z, p.b * a.z_b + p.d0, a.z_t, p.limit);
#endif
    B = States(a.B, p.b * a.B_b + p.group * a.B_g, a.B_t, a.N);
    C = States(a.C, p.b * a.C_b + p.group * a.C_g, a.C_t, a.N);
    valid = min(p.length, p.end);
    even = p.limit == BLOCK_D && a.N == NP;
    bias = at_pair(a.bias, p);
  }

  __device__ bool whole(i64 t) const { return even && t + Q <= valid; }
};

template <bool WHOLE>
__device__ void stage(const Args &a, const Sources &from, i64 t, const Tile &tile) {
  pair u[ITEMS], delta[ITEMS], dy[ITEMS], B[BC_ITEMS], C[BC_ITEMS];
  from.B.load<WHOLE>(t, from.valid, B);
  from.C.load<WHOLE>(t, from.valid, C);
  from.u.load<WHOLE>(t, from.valid, u);
  from.delta.load<WHOLE>(t, from.valid, delta);
  from.dy.load<WHOLE>(t, from.valid, dy);
#if GATED
  pair z[ITEMS];
  from.z.load<WHOLE>(t, from.valid, z);
#endif
  keep<1>(B, tile.Bs);
  keep<1>(C, tile.Cs);
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    const float2 x = widen(u[k]);
    float2 d = step_size(widen(delta[k]), from.bias), g = widen(dy[k]);
    if (!WHOLE && t + from.u.row(k) >= from.valid) d = make_float2(0.f, 0.f);
#if GATED
    const float2 gate = widen(z[k]);
    g.x *= gate.x * sigmoid(gate.x), g.y *= gate.y * sigmoid(gate.y);
#endif
    tile.steps[threadIdx.x + k * THREADS] = make_float4(d.x, d.x * x.x, d.y, d.y * x.y);
    tile.gated[threadIdx.x + k * THREADS] = g;
  }
}

// What reaches the state before each segment of a gradient of zero after it.
extern "C" __global__ void __launch_bounds__(THREADS)
scan_back_local(const __grid_constant__ Args a) {
  extern __shared__ float4 shared[];
  const Tile tile(shared);
  const Place p(a);
  const Sources from(a, p);
  float A2[CH][NS], g[CH][NS] = {}, total[CH] = {};
  load_states(a.A, p, a.N, A2);
  scale(A2, LOG2E);

  for (i64 t = p.begin + (p.end - 1 - p.begin) / Q * Q; t >= p.begin; t -= Q) {
    if (from.whole(t)) stage<true>(a, from, t, tile);
    else stage<false>(a, from, t, tile);
    __syncthreads();
    const float *step = reinterpret_cast<const float *>(tile.steps) + 2 * p.c0;
    const float *grad = reinterpret_cast<const float *>(tile.gated) + p.c0;
    const float *c_row = tile.Cs + p.state();
#pragma unroll 2
    for (int s = Q - 1; s >= 0; s--) {
      float d[2 * CH], dy[CH], Ct[NS];
      read<2 * CH>(step + s * 2 * BLOCK_D, d);
      read<CH>(grad + s * BLOCK_D, dy);
#pragma unroll
      for (int j = 0; j < NS; j += VN) read<VN>(c_row + s * NP + j * LN, Ct + j);
#pragma unroll
      for (int c = 0; c < CH; c++) {
        total[c] += d[2 * c];
#pragma unroll
        for (int j = 0; j < NS; j++)
          g[c][j] = exp2_(d[2 * c] * A2[c][j]) * fmaf(Ct[j], dy[c], g[c][j]);
      }
    }
    __syncthreads();
  }
  store_states(a.ends + (p.b * a.segments + p.segment) * a.channels * a.N, p, a.N, g);
  store_sums(a, p, total);
}

// What reaches the last state of this segment from later ones.
__device__ void gradient_after(const Args &a, const Place &p, const float (&A2)[CH][NS],
                               float (&g)[CH][NS]) {
  const i64 size = a.channels * a.N;
  if (a.dfinal) load_states(a.dfinal + p.b * size, p, a.N, g);
  for (i64 s = a.segments - 1; s > p.segment; s--) {
    const i64 i = p.b * a.segments + s;
    float end[CH][NS];
    load_states(a.ends + i * size, p, a.N, end);
#pragma unroll
    for (int c = 0; c < CH; c++) {
      const float sum = p.c0 + c < p.limit ? a.sums[i * a.channels + p.d0 + p.c0 + c] : 0.f;
#pragma unroll
      for (int j = 0; j < NS; j++) g[c][j] = fmaf(exp2_(A2[c][j] * sum), g[c][j], end[c][j]);
    }
  }
}

// The thread's part of a tile: pointers to its channels and states.
struct Lane {
  const float *step, *gated, *b_row, *c_row;
  float *sums, *outs;
  __device__ Lane(const Tile &tile, const Place &p) {
    step = reinterpret_cast<const float *>(tile.steps) + 2 * p.c0;
    gated = reinterpret_cast<const float *>(tile.gated) + p.c0;
    b_row = tile.Bs + p.state(), c_row = tile.Cs + p.state();
    const int part = p.warp % SPLIT * Q * PAIRS;
    sums = reinterpret_cast<float *>(tile.sums + part) + 2 * p.c0;
    outs = reinterpret_cast<float *>(tile.outs + part) + p.c0;
  }
  __device__ void states(const float *rows, int s, float *to) const {
#pragma unroll
    for (int j = 0; j < NS; j += VN) read<VN>(rows + s * NP + j * LN, to + j);
  }
};

// T steps of the recurrence from step s on; the states before them in ``before``.
template <bool KEPT>
__device__ void forward_steps(const Lane &lane, int s, const float (&A2)[CH][NS],
                              float (&h)[CH][NS], float (&before)[T][CH][NS],
                              float (&decay)[T][CH][NS]) {
#pragma unroll(KEPT ? T : 2)
  for (int i = 0; i < T; i++) {
    float d[2 * CH], Bt[NS];
    read<2 * CH>(lane.step + (s + i) * 2 * BLOCK_D, d);
    lane.states(lane.b_row, s + i, Bt);
#pragma unroll
    for (int c = 0; c < CH; c++)
#pragma unroll
      for (int j = 0; j < NS; j++) {
        const float a = exp2_(d[2 * c] * A2[c][j]);
        if constexpr (KEPT) before[i][c][j] = h[c][j], decay[i][c][j] = a;
        h[c][j] = fmaf(a, h[c][j], d[2 * c + 1] * Bt[j]);
      }
  }
}

// A thread's states in shared memory, (E / VN, THREADS, VN).
__device__ void put_aside(const float (&h)[CH][NS], float *to) {
#pragma unroll
  for (int i = 0; i < E; i += VN)
    write<VN>(to + i * THREADS + threadIdx.x * VN, h[i / NS] + i % NS);
}

__device__ void take_back(const float *from, float (&h)[CH][NS]) {
#pragma unroll
  for (int i = 0; i < E; i += VN)
    read<VN>(from + i * THREADS + threadIdx.x * VN, h[i / NS] + i % NS);
}

struct Sums {  // over the states, of TS steps
  float gB[TS * CH], gahA[TS * CH], Ch[TS * CH];
};

// One step back: sums over states go to ``sums``, those over channels to w (dB, dC).
__device__ void step_back(const Lane &lane, int s, int i, const float (&A2)[CH][NS],
                          const float (&h)[CH][NS], const float (&before)[CH][NS],
                          const float (&decay)[CH][NS], float (&g)[CH][NS],
                          float (&dA)[CH][NS], Sums &sums, float *w) {
  float d[2 * CH], dy[CH], Bt[NS], Ct[NS];
  read<2 * CH>(lane.step + s * 2 * BLOCK_D, d);
  read<CH>(lane.gated + s * BLOCK_D, dy);
  lane.states(lane.b_row, s, Bt);
  lane.states(lane.c_row, s, Ct);
#pragma unroll
  for (int c = 0; c < CH; c++) {
    float gB = 0.f, gahA = 0.f, Ch = 0.f;
#pragma unroll
    for (int j = 0; j < NS; j++) {
      const float now = fmaf(Ct[j], dy[c], g[c][j]);
      gB = fmaf(now, Bt[j], gB);
      w[j] = c ? fmaf(now, d[2 * c + 1], w[j]) : now * d[1];
      w[NS + j] = c ? fmaf(dy[c], h[c][j], w[NS + j]) : dy[0] * h[0][j];
#if GATED
      Ch = fmaf(Ct[j], h[c][j], Ch);
#endif
#if DECAYS
      g[c][j] = now * decay[c][j];
#else
      g[c][j] = now * exp2_(d[2 * c] * A2[c][j]);
#endif
      const float gah = g[c][j] * before[c][j];
      dA[c][j] = fmaf(gah, d[2 * c], dA[c][j]);
      gahA = fmaf(gah, A2[c][j], gahA);
    }
    sums.gB[i * CH + c] = gB, sums.gahA[i * CH + c] = gahA, sums.Ch[i * CH + c] = Ch;
  }
}

// Sums over states, to the warp's part of shared memory.
__device__ void put_sums(const Lane &lane, int s, int ln, Sums &sums) {
  constexpr int V = TS * CH;
  sum_lanes<V, LN, 1>(sums.gB);
  sum_lanes<V, LN, 1>(sums.gahA);
#if GATED
  sum_lanes<V, LN, 1>(sums.Ch);
#endif
  __syncwarp();
  if (!holds_total<V, LN>(ln)) return;
  const int first = first_total<V, LN>(ln);
#pragma unroll
  for (int i = 0; i < (V + LN - 1) / LN; i++) {
    const int row = s + (first + i) / CH, c = (first + i) % CH;
    *reinterpret_cast<float2 *>(lane.sums + row * 2 * BLOCK_D + 2 * c) =
        make_float2(sums.gB[i], sums.gahA[i]);
    lane.outs[row * BLOCK_D + c] = sums.Ch[i];
  }
}

// w summed over the warp's channels, to its row (2, NP) of shared memory.
__device__ void put_matrix_sums(const Place &p, float *w, float *row) {
  constexpr int V = 2 * NS;
  sum_lanes<V, CG, LN>(w);
  if (!holds_total<V, CG>(p.cg)) return;
  const int first = first_total<V, CG>(p.cg);
#pragma unroll
  for (int i = 0; i < (V + CG - 1) / CG; i++) {
    const int v = first + i;
    row[(v < NS ? 0 : NP) + p.state(v % NS)] = w[i];
  }
}

// The warps' rows added: dB and dC of FLUSH steps over the block's channels. All are in
// registers before the first is written, so that loads wait for no one's bounds.
__device__ void flush_matrix_sums(const Args &a, const Place &p, const float *sums, i64 t) {
  constexpr int WIDTH = 2 * NP, ALL = FLUSH * WIDTH, MINE = ALL / THREADS;
  constexpr int V = MINE < 4 ? MINE : 4;  // neighbours
  static_assert(ALL % THREADS == 0 && MINE % V == 0, "all threads have as many");
  float total[MINE];
#pragma unroll
  for (int k = 0; k < MINE; k += V) {
    const float *from = sums + k * THREADS + threadIdx.x * V;
    read<V>(from, total + k);
#pragma unroll
    for (int w = 1; w < ROWS_D; w++) {
      float more[V];
      read<V>(from + w * ALL, more);
#pragma unroll
      for (int i = 0; i < V; i++) total[k + i] += more[i];
    }
  }
  const i64 stride = a.groups * 2 * a.N;
  float *to = a.partial + (((i64)p.within * a.rows + p.b) * a.L + t) * stride +
              p.group * 2 * a.N;
#pragma unroll
  for (int k = 0; k < MINE; k += V) {
    const int at = k * THREADS + threadIdx.x * V, row = at / WIDTH;
    const int which = at % WIDTH / NP, n = at % NP;
    float *place = to + row * stride + which * a.N + n;
    if (t + row >= p.end) continue;
    if (a.N == NP) {
      write<V>(place, total + k);
    } else {
#pragma unroll
      for (int i = 0; i < V; i++)
        if (n + i < a.N) place[i] = total[k + i];
    }
  }
}

// The gradients over time, as this thread writes them.
struct Targets {
  Channels du, ddelta, dz;
  float2 D;
  __device__ Targets(const Args &a, const Place &p) {
    const i64 at = p.b * a.L * a.channels + p.d0;
    du = Channels(a.du, at, a.channels, p.limit);
    ddelta = Channels(a.ddelta, at, a.channels, p.limit);
#if GATED
    dz = Channels(a.dz, at, a.channels, p.limit);
#endif
    D = at_pair(a.D, p);
  }
};

struct Point {  // of one step and channel: inputs, sums over states, gradients
  float u, delta, z, dy, gB, gahA, Ch, du, ddelta, dz, dyg;

  __device__ void finish(float bias, float D) {
    float d = delta + bias, slope = 1.f;
#if SOFTPLUS
    d = softplus(d, slope);
#endif
    dyg = dy;
#if GATED
    const float s = sigmoid(z);
    dz = dy * fmaf(D, u, Ch) * s * fmaf(z, 1.f - s, 1.f);
    dyg *= z * s;
#endif
    du = fmaf(d, gB, D * dyg);
    ddelta = fmaf(u, gB, LN2 * gahA) * slope;
  }
};

// du, ddelta and dz of a tile from the sums over states.
template <bool WHOLE>
__device__ void finish(const Args &a, const Place &p, const Sources &from, const Targets &to,
                       i64 t, const Tile &tile, float2 &dD, float2 &dbias) {
  pair u[ITEMS], delta[ITEMS], dy[ITEMS];
  from.u.load<WHOLE>(t, from.valid, u);
  from.delta.load<WHOLE>(t, from.valid, delta);
  from.dy.load<WHOLE>(t, from.valid, dy);
#if GATED
  pair z[ITEMS];
  from.z.load<WHOLE>(t, from.valid, z);
#endif
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    float4 sums = tile.sums[threadIdx.x + k * THREADS];
    float2 Ch = tile.outs[threadIdx.x + k * THREADS];
#pragma unroll
    for (int part = 1; part < SPLIT; part++) {
      const int at = part * Q * PAIRS + threadIdx.x + k * THREADS;
      const float4 more = tile.sums[at];
      sums.x += more.x, sums.y += more.y, sums.z += more.z, sums.w += more.w;
      Ch.x += tile.outs[at].x, Ch.y += tile.outs[at].y;
    }
    const float2 us = widen(u[k]), deltas = widen(delta[k]), dys = widen(dy[k]);
    float2 zs = make_float2(0.f, 0.f);
#if GATED
    zs = widen(z[k]);
#endif
    Point x = {us.x, deltas.x, zs.x, dys.x, sums.x, sums.y, Ch.x};
    Point y = {us.y, deltas.y, zs.y, dys.y, sums.z, sums.w, Ch.y};
    x.finish(from.bias.x, to.D.x);
    y.finish(from.bias.y, to.D.y);
    if (!WHOLE && t + from.u.row(k) >= from.valid)
      x.du = y.du = x.ddelta = y.ddelta = x.dz = y.dz = x.dyg = y.dyg = 0.f;
    dD.x = fmaf(x.dyg, x.u, dD.x), dD.y = fmaf(y.dyg, y.u, dD.y);
    dbias.x += x.ddelta, dbias.y += y.ddelta;
    to.du.store<WHOLE>(t, p.end, k, make_float2(x.du, y.du));
    to.ddelta.store<WHOLE>(t, p.end, k, make_float2(x.ddelta, y.ddelta));
#if GATED
    to.dz.store<WHOLE>(t, p.end, k, make_float2(x.dz, y.dz));
#endif
  }
}

// A vector over channels summed over the block's rows of threads.
__device__ void store_vector(float *to, const Place &p, float2 x, float2 *shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x >= PAIRS) return;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float2 part = shared[r * PAIRS + threadIdx.x];
    sum.x += part.x, sum.y += part.y;
  }
  const int place = 2 * threadIdx.x;
  if (place < p.limit) to[p.d0 + place] = sum.x;
  if (place + 1 < p.limit) to[p.d0 + place + 1] = sum.y;
}

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD)
scan_back(const __grid_constant__ Args a) {
  extern __shared__ float4 shared[];
  const Tile tile(shared);
  const Place p(a);
  const Sources from(a, p);
  const Lane lane(tile, p);
  const Targets to(a, p);
  const i64 size = a.channels * a.N, tiles = (a.L + Q - 1) / Q;  // Q is KEEP

  float A2[CH][NS], g[CH][NS] = {}, dA[CH][NS] = {};
  float2 dD = make_float2(0.f, 0.f), dbias = dD;
  load_states(a.A, p, a.N, A2);
  scale(A2, LOG2E);
  gradient_after(a, p, A2, g);

  for (i64 t = p.begin + (p.end - 1 - p.begin) / Q * Q; t >= p.begin; t -= Q) {
    if (from.whole(t)) stage<true>(a, from, t, tile);
    else stage<false>(a, from, t, tile);
    float h[CH][NS], before[T][CH][NS], decay[T][CH][NS];
    load_states(a.starts + (p.b * tiles + t / Q) * size, p, a.N, h);
    __syncthreads();
    const int subs = (int)min((i64)SUBS, (p.end - t + T - 1) / T);  // that have a step
#pragma unroll 1
    for (int sub = 0; sub < subs - 1; sub++) {
      put_aside(h, tile.stash + sub * E * THREADS);
      forward_steps<false>(lane, sub * T, A2, h, before, decay);
    }
#pragma unroll 1
    for (int sub = subs - 1; sub >= 0; sub--) {
      if (sub < subs - 1) take_back(tile.stash + sub * E * THREADS, h);
      forward_steps<true>(lane, sub * T, A2, h, before, decay);
      float *row = tile.matrix_sums + p.warp / SPLIT * FLUSH * 2 * NP;
#pragma unroll
      for (int i = T - TS; i >= 0; i -= TS) {
        Sums sums;
#pragma unroll
        for (int k = TS - 1; k >= 0; k--) {
          float w[2 * NS];
          step_back(lane, sub * T + i + k, k, A2, i + k == T - 1 ? h : before[i + k + 1],
                    before[i + k], decay[i + k], g, dA, sums, w);
          put_matrix_sums(p, w, row + (i + k) % FLUSH * 2 * NP);
        }
        put_sums(lane, sub * T + i, p.ln, sums);
        if (i % FLUSH > 0) continue;
        __syncthreads();
        flush_matrix_sums(a, p, tile.matrix_sums, t + sub * T + i);
        __syncthreads();
      }
    }
    if (from.whole(t)) finish<true>(a, p, from, to, t, tile, dD, dbias);
    else finish<false>(a, p, from, to, t, tile, dD, dbias);
    __syncthreads();
  }

  const i64 row = p.b * a.segments + p.segment;
  store_states(a.dA_rows + row * size, p, a.N, dA);
  if (p.segment == 0 && a.dh0) store_states(a.dh0 + p.b * size, p, a.N, g);
  store_vector(a.dD_rows + row * a.channels, p, dD, reinterpret_cast<float2 *>(shared));
  store_vector(a.dbias_rows + row * a.channels, p, dbias, reinterpret_cast<float2 *>(shared));
}

// V neighbours of dB or dC, from the i-th of them on, added over the parts of a group.
template <int V>
__device__ void add_parts(const Args &a, i64 i) {
  const i64 parts = (a.channels / a.groups + BLOCK_D - 1) / BLOCK_D;
  const i64 matrix = a.rows * a.L * a.groups * 2 * a.N;
  float sum[V] = {};
#pragma unroll 8
  for (i64 k = 0; k < parts; k++) {
    float more[V];
    read<V>(a.partial + k * matrix + i, more);
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] += more[j];
  }
  const i64 n = i % a.N, which = i / a.N % 2, place = i / (2 * a.N) * a.N + n;
  scalar *to = (scalar *)(which ? a.dC : a.dB) + place;
#pragma unroll
  for (int j = 0; j < V; j++) to[j] = narrow(sum[j]);
}

// The blocks' sums added: dB, dC over the parts of a group; dA, dD, dbias over the rows.
extern "C" __global__ void __launch_bounds__(256) add_up(const __grid_constant__ Args a) {
  const i64 states = a.channels * a.N, rows = a.rows * a.segments;
  const i64 matrix = a.rows * a.L * a.groups * 2 * (a.N % 4 ? a.N : a.N / 4);
  i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i < matrix) {
    i = matrix - 1 - i;  // what was written last may be in the cache still
    if (a.N % 4) add_parts<1>(a, i);
    else add_parts<4>(a, 4 * i);
    return;
  }
  i -= matrix;
  const float *from = a.dA_rows;
  float *to = a.dA;
  i64 width = states;
  if (i >= states) {
    i -= states;
    width = a.channels;
    from = i < width ? a.dD_rows : a.dbias_rows;
    to = i < width ? a.dD : a.dbias;
    i = i < width ? i : i - width;
  }
  if (i >= width) return;
  float sum = 0.f;
#pragma unroll 8
  for (i64 k = 0; k < rows; k++) sum += from[k * width + i];
  to[i] = sum;
}
#endif
