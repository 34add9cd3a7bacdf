// What kernel files share, put before each of them: numbers as they lie in memory, and
// what a GPU has instructions for. Only here is PTX, so that a stand-in for this file lets
// the kernels run on a CPU (tests/ssm/ops/cuda_on_cpu/cuda.h).
//
// Defined before this: IO, what tensors over time hold (32 float, 16 half, 17 bfloat16).

typedef long long i64;
typedef unsigned short u16;

constexpr float LOG2E = 1.44269504088896340736f;

#if IO == 32
typedef float scalar;
typedef float2 pair;
__device__ float widen(scalar x) { return x; }
__device__ float2 widen(pair x) { return x; }
__device__ scalar narrow(float x) { return x; }
__device__ pair narrow(float2 x) { return x; }
#elif IO == 17
typedef u16 scalar;
typedef unsigned pair;
__device__ float widen(scalar x) { return __uint_as_float((unsigned)x << 16); }
__device__ float2 widen(pair x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
__device__ scalar narrow(float x) {
  scalar r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
__device__ pair narrow(float2 x) {
  pair r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x.y), "f"(x.x));
  return r;
}
#else
typedef u16 scalar;
typedef unsigned pair;
__device__ float widen(scalar x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
__device__ float2 widen(pair x) {
  return make_float2(widen((scalar)(x & 0xffff)), widen((scalar)(x >> 16)));
}
__device__ scalar narrow(float x) {
  scalar r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
__device__ pair narrow(float2 x) {
  pair r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x.y), "f"(x.x));
  return r;
}
#endif

__device__ float exp2_(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ float inverse(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ float sigmoid(float x) { return inverse(1.f + exp2_(-LOG2E * x)); }

// --- asynchronous copies to shared memory ----------------------------------------------

// 16 bytes, of which the first ``bytes`` are read and the others zeros.
__device__ void copy_16(char *to, const char *from, int bytes) {
  const unsigned place = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes)
               : "memory");
}

// The copies since the last call are one group.
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the last N.
template <int N>
__device__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
