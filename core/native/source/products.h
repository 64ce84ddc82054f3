/* Products of a few rows with weights in every stored form: dense, or packed as MLX packs them.

   Rows of weights are read in blocks of 128. A block becomes eight vectors of 16 weights. In natural order
   vector j holds weights 16j to 16j + 15; in lane order, which suits packed words, lane i of vector j holds
   weight 8i + j. Inputs are kept in both orders, padded with zeros to whole blocks. */

enum kind { FLOAT32, BFLOAT16, FLOAT16, AFFINE, MXFP4, MXFP8, NVFP4 };

#define BLOCK 128
#define MAX_ROWS 8
#define VECTORS (BLOCK / LANES)

struct matrix {
    const void *weight, *scales, *biases;
    int64_t rows, columns;
    int32_t kind, bits, group, scale_kind;
};

/* One to MAX_ROWS rows of `blocks` blocks each; more rows than one lie in memory for MAX_ROWS, as what is
   computed of those that are not there is thrown away. */
struct input {
    int rows;
    int64_t blocks;
    float *natural, *lanes; /* [rows, blocks * BLOCK] */
};

static int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

/* Fill `input` from rows of `columns` floats that begin `stride` apart. */
static void set_input(struct input *input, const float *x, int rows, int64_t columns, int64_t stride) {
    input->rows = rows;
    input->blocks = blocks_of(columns);
    int64_t width = input->blocks * BLOCK;
    for (int t = 0; t < rows; t++) {
        float *natural = input->natural + t * width, *lanes = input->lanes + t * width;
        memcpy(natural, x + t * stride, (size_t)columns * sizeof *x);
        memset(natural + columns, 0, (size_t)(width - columns) * sizeof *x);
        for (int64_t block = 0; block < width; block += BLOCK)
            for (int j = 0; j < VECTORS; j++)
                for (int i = 0; i < LANES; i++)
                    lanes[block + j * LANES + i] = natural[block + i * VECTORS + j];
    }
}

/* Row `t` of an input as an input of its own. */
static struct input one_row(const struct input *all, int t) {
    int64_t at = t * all->blocks * BLOCK;
    return (struct input){1, all->blocks, all->natural + at, all->lanes + at};
}

INLINE int is_natural(int kind, int bits) { return kind < AFFINE || bits == 8; }

/* --- scales --- */

INLINE float read_float(const void *values, int kind, int64_t at) {
    if (kind == FLOAT32) return ((const float *)values)[at];
    uint16_t half = ((const uint16_t *)values)[at];
    return kind == BFLOAT16 ? widen_bfloat16(half) : widen_float16(half);
}

/* E4M3: sign, four bits of exponent, three of fraction. */
INLINE float widen_e4m3(uint8_t code) {
    int exponent = code >> 3 & 15, fraction = code & 7;
    float x = exponent ? as_float((uint32_t)(exponent + 120) << 23 | (uint32_t)fraction << 20)
                       : (float)fraction * 0x1p-9f;
    return code & 128 ? -x : x;
}

INLINE float read_scale(const struct matrix *m, int kind, int64_t at) {
    if (kind == AFFINE) return read_float(m->scales, m->scale_kind, at);
    uint8_t code = ((const uint8_t *)m->scales)[at];
    if (kind == NVFP4) return widen_e4m3(code);
    return as_float(code ? (uint32_t)code << 23 : 1u << 22);
}

/* Of each lane's eight weights; groups have 16, 32, 64 or 128 weights. */
INLINE vf lane_values(const float *v, int group) {
    if (group == 128) return fill(v[0]);
    if (group == 64) return (vf){v[0], v[0], v[0], v[0], v[0], v[0], v[0], v[0], v[1], v[1], v[1], v[1], v[1], v[1], v[1], v[1]};
    if (group == 32) return (vf){v[0], v[0], v[0], v[0], v[1], v[1], v[1], v[1], v[2], v[2], v[2], v[2], v[3], v[3], v[3], v[3]};
    return (vf){v[0], v[0], v[1], v[1], v[2], v[2], v[3], v[3], v[4], v[4], v[5], v[5], v[6], v[6], v[7], v[7]};
}

/* --- codes --- */

#if defined(__AVX512F__)
INLINE vu gather(const uint8_t *p, int stride) {
    vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vu)_mm512_i32gather_epi32((__m512i)(lane * stride), p, 1);
}
#else
/* Sixteen little-endian words that begin `stride` bytes apart. */
INLINE vu gather(const uint8_t *p, int stride) {
    uint32_t words[LANES];
    for (int i = 0; i < LANES; i++) memcpy(words + i, p + i * stride, 4);
    vu v;
    memcpy(&v, words, sizeof v);
    return v;
}
#endif

/* Codes of `bits` bits, eight in a lane, as integers; p holds 16 * bits bytes. */
INLINE void lane_codes(const uint8_t *p, int bits, vu codes[VECTORS]) {
    uint32_t mask = (1u << bits) - 1;
    if (bits == 2) {
        vh h;
        memcpy(&h, p, sizeof h);
        vu words = __builtin_convertvector(h, vu);
        for (int j = 0; j < 8; j++) codes[j] = words >> 2 * j & mask;
    } else if (bits == 4) {
        vu words;
        memcpy(&words, p, sizeof words);
        for (int j = 0; j < 8; j++) codes[j] = words >> 4 * j & mask;
    } else if (bits == 3) { /* each word begins one byte before its three, but for the first */
        uint8_t shifted[1 + 48];
        shifted[0] = 0;
        memcpy(shifted + 1, p, 48);
        vu words = gather(shifted, 3);
        for (int j = 0; j < 8; j++) codes[j] = words >> (8 + 3 * j) & mask;
    } else if (bits == 5) {
        vu low = gather(p, 5), high = gather(p + 1, 5);
        for (int j = 0; j < 6; j++) codes[j] = low >> 5 * j & mask;
        for (int j = 6; j < 8; j++) codes[j] = high >> (5 * j - 8) & mask;
    } else if (bits == 6) {
        vu low = gather(p, 6), high = gather(p + 2, 6);
        for (int j = 0; j < 5; j++) codes[j] = low >> 6 * j & mask;
        for (int j = 5; j < 8; j++) codes[j] = high >> (6 * j - 16) & mask;
    }
}

/* E2M1 codes as twice their value: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives. */
INLINE vf e2m1_doubled(vu codes) {
    vu digits = {};
    digits += 0xc8643210u;
    vf magnitude = to_floats(digits >> (codes & 7) * 4 & 15);
    return as_floats((vu)magnitude | (codes & 8) << 28);
}

INLINE vf e4m3(vu codes) {
    vu is_small = where_negative((vi)(codes & 0x78) - 1);
    vu normal = ((codes & 0x7f) << 20) + (120u << 23);
    vf small = to_floats(codes & 7) * 0x1p-9f;
    return as_floats((is_small & (vu)small) | (~is_small & normal) | (codes & 0x80) << 24);
}

INLINE vu bytes_at(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    __m256i halves[2];
    for (int i = 0; i < 2; i++) halves[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
    vu v;
    memcpy(&v, halves, sizeof v);
    return v;
#endif
    vb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vh), vu); /* in one step GCC 12 takes them singly */
}

/* --- blocks of weights --- */

/* One block from its row's weights, scales and biases on. `kind` and `bits` are constants wherever this is called. */
INLINE void unpack(const struct matrix *m, int kind, int bits, int64_t at, vf w[VECTORS]) {
    if (kind < AFFINE) {
        for (int j = 0; j < VECTORS; j++) {
            int64_t place = at + j * LANES;
            w[j] = kind == FLOAT32    ? load((const float *)m->weight + place)
                   : kind == BFLOAT16 ? load_bfloat16((const uint16_t *)m->weight + place)
                                      : load_float16((const uint16_t *)m->weight + place);
        }
        return;
    }
    const uint8_t *p = (const uint8_t *)m->weight + at * bits / 8;
    int group = kind == NVFP4 ? 16 : kind == AFFINE ? m->group : 32, shift = __builtin_ctz((unsigned)group);
    int64_t first = at >> shift;
    float scales[8], biases[8];
    for (int g = 0; g < BLOCK >> shift; g++) {
        scales[g] = read_scale(m, kind, first + g);
        if (kind == AFFINE) biases[g] = read_float(m->biases, m->scale_kind, first + g);
    }
    if (bits == 8) {
        for (int j = 0; j < VECTORS; j++) {
            vu codes = bytes_at(p + j * LANES);
            int g = j / 2 * 2 * LANES >> shift; /* groups have 32 weights at least: neighbours share a scale */
            vf scale = fill(scales[g]);
            w[j] = kind == AFFINE ? to_floats(codes) * scale + fill(biases[g]) : e4m3(codes) * scale;
        }
        return;
    }
    vu codes[VECTORS];
    lane_codes(p, bits, codes);
    vf scale = lane_values(scales, group), bias = kind == AFFINE ? lane_values(biases, group) : fill(0);
    for (int j = 0; j < VECTORS; j++)
        w[j] = kind == AFFINE ? to_floats(codes[j]) * scale + bias : e2m1_doubled(codes[j]) * (scale * 0.5f);
}

/* The last block of a row that is not whole: from a copy, padded with zeros. */
INLINE void unpack_rest(const struct matrix *m, int kind, int bits, int64_t at, vf w[VECTORS]) {
    int64_t count = m->columns % BLOCK;
    uint8_t weight[BLOCK * 4] = {0}, scales[BLOCK * 4] = {0}, biases[BLOCK * 4] = {0};
    struct matrix rest = *m;
    memcpy(weight, (const uint8_t *)m->weight + at * bits / 8, (size_t)(count * bits / 8));
    rest.weight = weight;
    if (kind >= AFFINE) {
        int each = kind != AFFINE ? 1 : m->scale_kind == FLOAT32 ? 4 : 2;
        size_t nbytes = (size_t)(count / m->group * each);
        memcpy(scales, (const uint8_t *)m->scales + at / m->group * each, nbytes);
        rest.scales = scales;
        if (kind == AFFINE) memcpy(biases, (const uint8_t *)m->biases + at / m->group * each, nbytes);
        rest.biases = biases;
    }
    unpack(&rest, kind, bits, 0, w);
}

/* Eight vectors as 128 weights in their order. */
INLINE void put_natural(float *out, const vf w[VECTORS], int natural) {
    for (int j = 0; j < VECTORS; j++)
        for (int i = 0; i < LANES; i++) out[natural ? j * LANES + i : i * VECTORS + j] = w[j][i];
}

/* --- rows --- */

#define TILE 4 /* inputs that one reading of a row serves; more take another */

typedef void unpack_function(const struct matrix *, int64_t at, vf w[VECTORS]);

/* One row of weights times `tile` rows of x: out[t]. */
INLINE void multiply_row(
    const struct matrix *m, int kind, int bits, unpack_function *rest, int64_t row, const float *x, int64_t width, int tile, float *out
) {
    vf total[TILE][2] = {0}, w[VECTORS];
    int64_t at = row * m->columns, whole = m->columns / BLOCK * BLOCK;
    for (int64_t c = 0; c < m->columns; c += BLOCK) {
        if (c < whole) unpack(m, kind, bits, at + c, w);
        else rest(m, at + c, w);
        for (int t = 0; t < tile; t++)
            for (int j = 0; j < VECTORS; j++) total[t][j & 1] += w[j] * load(x + t * width + c + j * LANES);
    }
    for (int t = 0; t < tile; t++) out[t] = sum(total[t][0] + total[t][1]);
}

/* out[t * stride + row - from] for rows from <= row < to */
typedef void rows_function(const struct matrix *, int64_t from, int64_t to, const struct input *, float *out, int64_t stride);

#define FUNCTIONS(name, kind, bits)                                                                                \
    __attribute__((noinline)) static void name##_rest(const struct matrix *m, int64_t at, vf w[VECTORS]) {         \
        unpack_rest(m, kind, bits, at, w);                                                                         \
    }                                                                                                              \
    static void name(                                                                                              \
        const struct matrix *m, int64_t from, int64_t to, const struct input *in, float *out, int64_t stride       \
    ) {                                                                                                            \
        const float *x = is_natural(kind, bits) ? in->natural : in->lanes;                                         \
        int64_t width = in->blocks * BLOCK;                                                                        \
        float found[TILE];                                                                                         \
        for (int64_t row = from; row < to; row++) {                                                                \
            if (in->rows == 1) {                                                                                   \
                multiply_row(m, kind, bits, name##_rest, row, x, width, 1, out + row - from);                      \
                continue;                                                                                          \
            }                                                                                                      \
            for (int t = 0; t < in->rows; t++) {                                                                   \
                if (t % TILE == 0) multiply_row(m, kind, bits, name##_rest, row, x + t * width, width, TILE, found); \
                out[t * stride + row - from] = found[t % TILE];                                                    \
            }                                                                                                      \
        }                                                                                                          \
    }                                                                                                              \
    static void name##_widen(const struct matrix *m, int64_t row, float *out) {                                    \
        vf w[VECTORS];                                                                                             \
        int64_t whole = m->columns / BLOCK * BLOCK, at = row * m->columns;                                         \
        for (int64_t c = 0; c < whole; c += BLOCK) {                                                               \
            unpack(m, kind, bits, at + c, w);                                                                      \
            put_natural(out + c, w, is_natural(kind, bits));                                                       \
        }                                                                                                          \
        if (whole == m->columns) return;                                                                           \
        float block[BLOCK];                                                                                        \
        name##_rest(m, at + whole, w);                                                                             \
        put_natural(block, w, is_natural(kind, bits));                                                             \
        memcpy(out + whole, block, (size_t)(m->columns - whole) * sizeof *out);                                    \
    }

FUNCTIONS(float32, FLOAT32, 32)
FUNCTIONS(bfloat16, BFLOAT16, 16)
FUNCTIONS(float16, FLOAT16, 16)
FUNCTIONS(affine2, AFFINE, 2)
FUNCTIONS(affine3, AFFINE, 3)
FUNCTIONS(affine4, AFFINE, 4)
FUNCTIONS(affine5, AFFINE, 5)
FUNCTIONS(affine6, AFFINE, 6)
FUNCTIONS(affine8, AFFINE, 8)
FUNCTIONS(mxfp4, MXFP4, 4)
FUNCTIONS(mxfp8, MXFP8, 8)
FUNCTIONS(nvfp4, NVFP4, 4)

static const struct form {
    int kind, bits;
    rows_function *rows;
    void (*widen)(const struct matrix *, int64_t row, float *out);
} FORMS[] = {
    {FLOAT32, 32, float32, float32_widen}, {BFLOAT16, 16, bfloat16, bfloat16_widen},
    {FLOAT16, 16, float16, float16_widen}, {AFFINE, 2, affine2, affine2_widen},
    {AFFINE, 3, affine3, affine3_widen},   {AFFINE, 4, affine4, affine4_widen},
    {AFFINE, 5, affine5, affine5_widen},   {AFFINE, 6, affine6, affine6_widen},
    {AFFINE, 8, affine8, affine8_widen},   {MXFP4, 4, mxfp4, mxfp4_widen},
    {MXFP8, 8, mxfp8, mxfp8_widen},        {NVFP4, 4, nvfp4, nvfp4_widen},
};

/* The functions for a matrix; NULL for a form that there is none for. */
static const struct form *form_of(const struct matrix *m) {
    int fits = m->kind < AFFINE || m->group == (m->kind == NVFP4 ? 16 : 32)
               || (m->kind == AFFINE && (m->group == 64 || m->group == 128));
    for (size_t i = 0; fits && i < sizeof FORMS / sizeof *FORMS; i++)
        if (FORMS[i].kind == m->kind && FORMS[i].bits == m->bits) return FORMS + i;
    return NULL;
}

/* --- products, shared among threads --- */

enum then { STORE, ADD, GATE };

/* out[t, row] = (or +=) the product with rows first ... first + rows - 1 of `matrix`;
   with GATE out = silu(product with matrix) * product with `up`. */
struct product {
    const struct matrix *matrix, *up;
    int64_t first, rows;
    const struct input *input;
    float *out;
    int64_t stride;
    enum then then;
    int64_t step; /* rows of one item */
    int items;
};

struct products {
    struct product *all;
    int count;
};

#define ITEM_NBYTES 32768
#define ITEM_ROWS 512

static int64_t row_nbytes(const struct matrix *m) { return m->columns * m->bits / 8; }

static void product_rows(const struct product *p, int64_t from, int64_t to) {
    float found[MAX_ROWS * ITEM_ROWS], up[MAX_ROWS * ITEM_ROWS];
    int64_t count = to - from, first = p->first;
    int rows = p->input->rows;
    form_of(p->matrix)->rows(p->matrix, first + from, first + to, p->input, found, count);
    if (p->then == GATE) {
        form_of(p->up)->rows(p->up, first + from, first + to, p->input, up, count);
        for (int64_t i = 0; i < count * rows; i++) found[i] *= sigmoid(found[i]) * up[i];
    }
    for (int t = 0; t < rows; t++)
        for (int64_t i = 0; i < count; i++) {
            float *out = p->out + t * p->stride + from + i;
            *out = p->then == ADD ? *out + found[t * count + i] : found[t * count + i];
        }
}

static void product_item(void *argument, int item) {
    const struct products *jobs = argument;
    const struct product *p = jobs->all;
    for (; item >= p->items; p++) item -= p->items;
    int64_t from = item * p->step, to = from + p->step;
    product_rows(p, from, to < p->rows ? to : p->rows);
}

/* Compute all of them at once. */
static void multiply(struct product *all, int count) {
    struct products jobs = {all, count};
    int items = 0;
    for (int i = 0; i < count; i++) {
        struct product *p = all + i;
        int64_t nbytes = row_nbytes(p->matrix) * (p->then == GATE ? 2 : 1);
        p->step = ITEM_NBYTES / nbytes;
        p->step = p->step < 4 ? 4 : p->step > ITEM_ROWS ? ITEM_ROWS : p->step;
        p->items = (int)((p->rows + p->step - 1) / p->step);
        items += p->items;
    }
    parallel(product_item, &jobs, items);
}

static struct product product_of(const struct matrix *m, const struct input *in, float *out, int64_t stride, enum then then) {
    return (struct product){.matrix = m, .rows = m->rows, .input = in, .out = out, .stride = stride, .then = then};
}
