// CUDA C++ on a CPU, for tests: a stand-in for ssm/ops/common.cu and for CUDA itself.
//
// The threads of a block are fibres that take turns, from one barrier or shuffle to the
// next; blocks run one after the other. Shared memory begins as NaN. Asynchronous copies
// are done when they are asked for (``eager``) or when they are waited for, the earliest
// and the latest that a GPU may: kernels must give the same numbers with both.
//
// Defined before this: IO, as in common.cu.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

using std::max;
using std::min;

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

typedef long long i64;
typedef unsigned short u16;

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index { unsigned x; };
static Index threadIdx, blockIdx;
extern "C" int eager = 0;
float4 shared[1 << 14];  // 256 KiB, which is more than a multiprocessor has

// --- threads ---------------------------------------------------------------------------

struct Copy {
  char *to;
  const char *from;
  int bytes;
  void run() const {
    memset(to, 0, 16);
    memcpy(to, from, bytes);
  }
};

struct Fibre {
  static constexpr size_t SIZE = 1 << 18;
  std::unique_ptr<char[]> stack{new char[SIZE]};
  jmp_buf here;  // where it goes on: swapcontext would cost system calls each time
  bool begun = false, done = false;
  std::vector<Copy> open;                 // copies that are in no group yet
  std::vector<std::vector<Copy>> groups;  // that are not waited for yet
};

struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
  void release_if_all() {
    if (size > 0 && arrived == size) arrived = 0, generation++;
  }
};

static std::vector<std::unique_ptr<Fibre>> fibres;
static std::vector<Barrier> warps;
static Barrier block;
static jmp_buf scheduler;
static std::function<void()> body;
static bool moved;  // whether any thread went on since all were last asked

static Fibre &self() { return *fibres[threadIdx.x]; }

static void wait_at(Barrier &barrier) {
  const unsigned generation = barrier.generation;
  barrier.arrived++, moved = true;
  barrier.release_if_all();
  while (barrier.generation == generation)
    if (!_setjmp(self().here)) _longjmp(scheduler, 1);
  moved = true;
}

static void __syncthreads() { wait_at(block); }
static void __syncwarp() { wait_at(warps[threadIdx.x / 32]); }

static void begin() {
  body();
  self().done = moved = true;
  for (Barrier *barrier : {&block, &warps[threadIdx.x / 32]}) {  // who left holds none up
    barrier->size--;
    barrier->release_if_all();
  }
  _longjmp(scheduler, 1);
}

// Lets one thread run until it waits or ends.
static void resume(Fibre &fibre) {
  if (_setjmp(scheduler)) return;
  if (fibre.begun) _longjmp(fibre.here, 1);
  fibre.begun = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fibre.stack.get();
  start.uc_stack.ss_size = Fibre::SIZE;
  start.uc_link = nullptr;
  makecontext(&start, begin, 0);
  setcontext(&start);
}

// Whether every thread came to its end; false where they wait for each other for ever.
static bool run_block(int threads) {
  const float4 nan = {NAN, NAN, NAN, NAN};
  std::fill(std::begin(shared), std::end(shared), nan);
  block = Barrier{threads};
  warps.assign((threads + 31) / 32, Barrier{32});
  while ((int)fibres.size() < threads) fibres.push_back(std::make_unique<Fibre>());
  for (int i = 0; i < threads; i++) {
    Fibre &fibre = *fibres[i];
    fibre.begun = fibre.done = false;
    fibre.open.clear(), fibre.groups.clear();
  }
  for (bool left = true; left;) {
    left = moved = false;
    for (int i = 0; i < threads; i++) {
      if (fibres[i]->done) continue;
      left = true, threadIdx.x = i;
      resume(*fibres[i]);
    }
    if (left && !moved) return false;
  }
  return true;
}

static bool launch(int blocks, int threads, std::function<void()> kernel) {
  body = kernel;
  for (int i = 0; i < blocks; i++) {
    blockIdx.x = i;
    if (!run_block(threads)) return false;
  }
  return true;
}

static float __shfl_xor_sync(unsigned, float x, int mask) {
  static float values[32][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  values[warp][lane] = x;
  __syncwarp();
  const float other = values[warp][lane ^ mask];
  __syncwarp();
  return other;
}

// --- what common.cu has ----------------------------------------------------------------

constexpr float LOG2E = 1.44269504088896340736f;

static float __uint_as_float(unsigned x) {
  float r;
  memcpy(&r, &x, 4);
  return r;
}

#if IO == 32
typedef float scalar;
typedef float2 pair;
static float widen(scalar x) { return x; }
static scalar narrow(float x) { return x; }
static float2 widen(pair x) { return x; }
static pair narrow(float2 x) { return x; }
#else
typedef u16 scalar;
typedef unsigned pair;
#if IO == 17
static float widen(scalar x) { return __uint_as_float((unsigned)x << 16); }
static scalar narrow(float x) {  // to the nearest, to the even one of two
  unsigned bits;
  memcpy(&bits, &x, 4);
  return (scalar)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
static float widen(scalar x) {
  _Float16 half;
  memcpy(&half, &x, 2);
  return (float)half;
}
static scalar narrow(float x) {
  const _Float16 half = (_Float16)x;
  scalar r;
  memcpy(&r, &half, 2);
  return r;
}
#endif
static float2 widen(pair x) { return {widen((scalar)(x & 0xffff)), widen((scalar)(x >> 16))}; }
static pair narrow(float2 x) { return narrow(x.x) | (unsigned)narrow(x.y) << 16; }
#endif

static float exp2_(float x) { return exp2f(x); }
static float inverse(float x) { return 1.f / x; }
static float sigmoid(float x) { return inverse(1.f + exp2_(-LOG2E * x)); }

static void copy_16(char *to, const char *from, int bytes) {
  const Copy copy = {to, from, bytes};
  if (eager) copy.run();
  else self().open.push_back(copy);
}

static void commit_copies() {
  self().groups.push_back(self().open);
  self().open.clear();
}

template <int N>
static void await_copies() {
  auto &groups = self().groups;
  while (groups.size() > N) {
    for (const Copy &copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}
