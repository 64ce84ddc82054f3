/* Vectors of 16 floats in the compiler's own notation: AVX-512, two of AVX2 or four of NEON.

   Needs GCC 9 or clang. Loads and stores take any address. */

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint8_t vb __attribute__((vector_size(16)));

/* GCC makes and converts vectors wider than the machine's one number at a time, so that is done in pieces. */
#if defined(__AVX512F__)
#define PIECE 64
#elif defined(__AVX2__)
#define PIECE 32
#else
#define PIECE 16
#endif

INLINE vf fill(float x) {
    typedef float piece __attribute__((vector_size(PIECE)));
    piece pieces[64 / PIECE];
    for (int i = 0; i < 64 / PIECE; i++) pieces[i] = (piece){} + x;
    vf v;
    memcpy(&v, pieces, sizeof v);
    return v;
}

INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE float sum(vf v) {
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    half h[2];
    memcpy(h, &v, sizeof h);
    h[0] += h[1];
    quarter q[2];
    memcpy(q, h, sizeof q);
    q[0] += q[1];
    return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

/* Bits as floats. */
INLINE vf as_floats(vu bits) { vf v; memcpy(&v, &bits, sizeof v); return v; }
INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }

/* Sixteen stored numbers, widened. */
INLINE vf load_bfloat16(const uint16_t *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return as_floats(__builtin_convertvector(h, vu) << 16);
}

INLINE vf to_floats(vu integers) {
    typedef int32_t whole __attribute__((vector_size(PIECE)));
    typedef float floats __attribute__((vector_size(PIECE)));
    whole from[64 / PIECE];
    floats to[64 / PIECE];
    memcpy(from, &integers, sizeof from);
    for (int i = 0; i < 64 / PIECE; i++) to[i] = __builtin_convertvector(from[i], floats);
    vf v;
    memcpy(&v, to, sizeof v);
    return v;
}

/* Masks are made by shifts of signs, here and elsewhere: wide vectors are compared singly, too. */
INLINE vu where_negative(vi v) { return (vu)(v >> 31); }

#if defined(__AVX512F__)
INLINE vf load_float16(const uint16_t *p) {
    __m256i h;
    memcpy(&h, p, sizeof h);
    return (vf)_mm512_cvtph_ps(h);
}
#else
INLINE vf load_float16(const uint16_t *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    vu bits = __builtin_convertvector(h, vu);
    vu magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    /* 2**112 rebiases the exponent; a subnormal half is an integer times 2**-24 */
    vf normal = as_floats(magnitude + (112u << 23));
    vf small = to_floats(bits & 0x7fff) * 0x1p-24f;
    vi exponent = (vi)(bits & 0x7c00);
    vu is_small = where_negative(exponent - 1), is_special = where_negative(0x7bff - exponent);
    vu found;
    memcpy(&found, &normal, sizeof found);
    vu of_small;
    memcpy(&of_small, &small, sizeof of_small);
    found = (is_small & of_small) | (~is_small & found);
    found += is_special & (112u << 23); /* infinities and NaN */
    return as_floats(found | sign);
}
#endif

INLINE float widen_bfloat16(uint16_t h) { return as_float((uint32_t)h << 16); }

INLINE float widen_float16(uint16_t h) {
    uint32_t exponent = h >> 10 & 31, fraction = h & 1023, sign = (uint32_t)(h & 0x8000) << 16;
    if (exponent == 0) {
        float x = (float)fraction * 0x1p-24f;
        return sign ? -x : x;
    }
    return as_float(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

/* e**x by Cephes' polynomial, for x clipped to [-87, 88]; relative error 8e-8. */
INLINE vf exponential(vf x) {
    vu low = where_negative((vi)(x + 87.0f)), high = where_negative((vi)(88.0f - x));
    x = as_floats(((vu)x & ~low & ~high) | ((vu)fill(-87.0f) & low) | ((vu)fill(88.0f) & high));
    vf shifted = x * 1.4426950408889634f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vf p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    vu power = ((vu)shifted << 23) + (127u << 23);
    return p * as_floats(power);
}

INLINE vf sigmoids(vf x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* Sums over n floats; n is a multiple of LANES. */
INLINE float dot(const float *a, const float *b, int64_t n) {
    vf total[2] = {{}, {}};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) total[j] += load(a + i + j * LANES) * load(b + i + j * LANES);
    for (; i < n; i += LANES) total[0] += load(a + i) * load(b + i);
    return sum(total[0] + total[1]);
}

/* out = x / rms(x) * weight; any n. */
static void rms_norm(float *out, const float *x, const float *weight, int64_t n, float eps) {
    int64_t whole = n & -LANES;
    float squares = dot(x, x, whole);
    for (int64_t i = whole; i < n; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / (float)n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}
