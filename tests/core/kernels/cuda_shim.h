// Just enough of CUDA to run a kernel's text with `fibers.h`.
#define __device__
#define __shared__ static
#define __location__(where)
#define __launch_bounds__(threads, blocks)
#define threadIdx thread_place
#define blockIdx block_place
typedef bfloat __nv_bfloat16;
typedef bfloat2 __nv_bfloat162;
struct __half2 { half x, y; };
inline __half2 __floats2half2_rn(float a, float b) { return {half(a), half(b)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {half_fma(a.x, b.x, c.x), half_fma(a.y, b.y, c.y)}; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {bfloat(a), bfloat(b)}; }
inline float __uint_as_float(uint x) { return bits_as<float>(x); }
inline uint __float_as_uint(float x) { return bits_as<uint>(x); }
inline float cosf(float x) { return __builtin_cosf(x); }
inline float sinf(float x) { return __builtin_sinf(x); }
inline uint __byte_perm(uint low, uint high, uint picks) {
  const uint64_t bytes = low | uint64_t(high) << 32;
  uint picked = 0;
  for (uint i = 0; i < 4; ++i) picked |= uint(bytes >> 8 * (picks >> 4 * i & 7) & 0xff) << 8 * i;
  return picked;
}
template <class T> T __ldcs(const T* p) { return *p; }
inline float __shfl_xor_sync(uint, float x, uint mask) { return from_lane_xor(x, mask); }
inline void __threadfence() {}
inline void __nanosleep(uint) {}
inline void __syncthreads() { wait_for_block(); }
static uint tiles_given[2][1024][6];
inline void multiply_tiles(float (&sum)[4], uint a, uint b, uint c, uint d, uint x, uint y) {
  const uint self = current, first = self / 32 * 32, lane = self % 32, turn = ++fibers[self].shuffles;
  const uint words[6] = {a, b, c, d, x, y};
  memcpy(tiles_given[turn & 1][self], words, sizeof words);
  for (uint i = first; i < first + 32; ++i)
    while (!fibers[i].done && fibers[i].shuffles < turn) wait_for_others();
  const auto given = tiles_given[turn & 1] + first;
  for (uint i = 0; i < 4; ++i) {
    const uint row = lane / 4 * 4, column = (lane % 4 * 2 + i % 2) * 4;
    for (uint k = 0; k < 4; ++k)
      for (uint half = 0; half < 2; ++half) {  // columns 2 k and 2 k + 1, and 8 further
        const uint weights = given[row + k][2 * half + i / 2], inputs = given[column + k][4 + half];
        sum[i] += __uint_as_float(weights << 16) * __uint_as_float(inputs << 16);
        sum[i] += __uint_as_float(weights & 0xffff0000u) * __uint_as_float(inputs & 0xffff0000u);
      }
  }
}
