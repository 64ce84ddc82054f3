// Just enough of Metal to run a kernel's text with `fibers.h`.
#define device
#define constant
#define threadgroup static
#define thread_position_in_threadgroup thread_place
#define threadgroup_position_in_grid block_place
struct half2 {
  half x, y;
  half2() {}
  half2(half a, half b) : x(a), y(b) {}
};
struct uchar4 {
  unsigned char bytes[4];
  uchar4() {}
  uchar4(unsigned char a, unsigned char b, unsigned char c, unsigned char d) : bytes{a, b, c, d} {}
  unsigned char operator[](int i) const { return bytes[i]; }
};
template <class T, class U> T as_type(U x) { return bits_as<T>(x); }
inline half2 fma(half2 a, half2 b, half2 c) { return half2(half_fma(a.x, b.x, c.x), half_fma(a.y, b.y, c.y)); }
namespace precise {
inline float cos(float x) { return __builtin_cosf(x); }
inline float sin(float x) { return __builtin_sinf(x); }
}
inline float simd_shuffle_xor(float x, ushort mask) { return from_lane_xor(x, mask); }
inline float simd_sum(float x) {
  for (uint mask = 16; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  return x;
}
enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { wait_for_block(); }
