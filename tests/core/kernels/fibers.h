// GPU threads on a CPU: each is a fiber, which runs until it needs what another one has not done yet. Also the
// types that Metal and CUDA share.
// The standard library's own headers would take longer to compile than a kernel.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef _Float16 half;
struct uint2 { uint x, y; };
struct uint3 { uint x, y, z; };
#ifndef FOUR_ALIGNMENT
#define FOUR_ALIGNMENT 16
#endif
struct alignas(FOUR_ALIGNMENT) uint4 { uint x, y, z, w; };
struct alignas(FOUR_ALIGNMENT) float4 { float x, y, z, w; };
template <class T, class U> T bits_as(U x) {
  static_assert(sizeof(T) == sizeof(U), "bits keep their number");
  T y;
  memcpy(&y, &x, sizeof y);
  return y;
}
struct bfloat {
  uint16_t bits;
  bfloat() {}
  explicit bfloat(float x) {
    const uint32_t b = bits_as<uint32_t>(x);
    bits = (b + 0x7fff + (b >> 16 & 1)) >> 16;  // to the nearest, ties to even
  }
  operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
};
struct bfloat2 {
  bfloat x, y;
  bfloat2(bfloat a, bfloat b) : x(a), y(b) {}
};
inline float exp(float x) { return __builtin_expf(x); }
inline float log(float x) { return __builtin_logf(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
// one rounding too many: a product of halves and its sum with a third are all but exact in float32
inline half half_fma(half a, half b, half c) { return half(float(a) * float(b) + float(c)); }

struct Fiber {
  ucontext_t context;
  char stack[1 << 16];
  uint shuffles, barriers;  // how many of each it has come to
  float given[2];           // in the last two shuffles
  bool done;
};
static Fiber* fibers;
static ucontext_t scheduler;
static uint current, block_threads;
static uint3 thread_place, block_place;
static void (*function)();

static void wait_for_others() {
  const uint self = current;
  swapcontext(&fibers[self].context, &scheduler);
}
static float from_lane_xor(float x, uint mask) {
  const uint self = current, first = self / 32 * 32, turn = ++fibers[self].shuffles;
  fibers[self].given[turn & 1] = x;
  for (uint i = first; i < first + 32; ++i)
    while (!fibers[i].done && fibers[i].shuffles < turn) wait_for_others();
  return fibers[self ^ mask].given[turn & 1];
}
static void wait_for_block() {
  const uint turn = ++fibers[current].barriers;
  for (uint i = 0; i < block_threads; ++i)
    while (!fibers[i].done && fibers[i].barriers < turn) wait_for_others();
}
static void start() {
  thread_place = {current, 0, 0};
  function();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
static void run_block() {
  for (uint i = 0; i < block_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.shuffles = fiber.barriers = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = sizeof fiber.stack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (current = 0; current < block_threads; ++current) {
      if (fibers[current].done) continue;
      left = true;
      swapcontext(&scheduler, &fibers[current].context);
    }
  }
}
static void run_grid(uint x, uint y, uint z, uint threads, void (*kernel)()) {
  function = kernel;
  block_threads = threads;
  fibers = static_cast<Fiber*>(malloc(threads * sizeof(Fiber)));
  for (uint c = 0; c < z; ++c)
    for (uint b = 0; b < y; ++b)
      for (uint a = 0; a < x; ++a) {
        block_place = {a, b, c};
        run_block();
      }
  free(fibers);
}
