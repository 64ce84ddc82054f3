/* Causal attention of a few tokens over a cache of keys and values, between its projections.

   Each item is a key head and a stretch of positions, read once for all queries that share it; the stretches'
   softmaxes are joined at the end. */

struct attention {
    int32_t heads, kv_heads, dim, rotary;
    const float *q_norm, *k_norm, *frequencies; /* [D], [D], [rotary / 2] */
    struct matrix q, k, v, out;
};

#define STRETCH 256

struct attention_work {
    const struct attention *net;
    int tokens, stretches;
    int64_t position, capacity; /* tokens before these; keys and values [Hkv, capacity, D] */
    const float *keys, *values;
    const float *queries; /* [Hkv, T * r, D], scaled */
    float *partial;       /* [Hkv, stretches, T * r, D + 2]: weighted sum, largest score, sum of weights */
};

/* Norm, then rotation by the position, in place. */
static void place_head(float *x, const struct attention *net, const float *norm, int64_t position, float eps) {
    rms_norm(x, x, norm, net->dim, eps);
    int half = net->rotary / 2;
    for (int i = 0; i < half; i++) {
        float angle = (float)position * net->frequencies[i], c = cosf(angle), s = sinf(angle);
        float first = x[i], second = x[i + half];
        x[i] = first * c - second * s;
        x[i + half] = first * s + second * c;
    }
}

/* Scores of one query against keys, their weights in place of them; what is beyond `seen` counts nothing. */
static void weigh(const float *query, const float *keys, int64_t dim, int count, int seen, float *scores, float *end) {
    float most = -INFINITY;
    for (int p = 0; p < seen; p++) {
        scores[p] = dot(query, keys + p * dim, dim);
        if (scores[p] > most) most = scores[p];
    }
    for (int p = seen; p < count; p++) scores[p] = -INFINITY;
    float total = 0;
    for (int p = 0; p < count; p += LANES) {
        store(scores + p, exponential(load(scores + p) - (seen ? most : 0)));
        for (int i = p; i < p + LANES; i++) {
            if (i >= seen) scores[i] = 0;
            total += scores[i];
        }
    }
    end[0] = most;
    end[1] = total;
}

static void attend_stretch(void *argument, int item) {
    const struct attention_work *work = argument;
    const struct attention *net = work->net;
    int64_t dim = net->dim, total = work->position + work->tokens;
    int head = item / work->stretches, shared = net->heads / net->kv_heads, queries = work->tokens * shared;
    int64_t from = (int64_t)(item % work->stretches) * STRETCH, left = total - from;
    int count = (int)(left < STRETCH ? left : STRETCH);
    const float *keys = work->keys + (head * work->capacity + from) * dim;
    const float *values = work->values + (head * work->capacity + from) * dim;
    float scores[STRETCH];
    for (int query = 0; query < queries; query++) {
        float *out = work->partial + ((int64_t)item * queries + query) * (dim + 2);
        int64_t visible = work->position + query / shared + 1 - from;
        int seen = (int)(visible < 0 ? 0 : visible < count ? visible : count);
        const float *q = work->queries + ((int64_t)head * queries + query) * dim;
        weigh(q, keys, dim, (count + LANES - 1) & -LANES, seen, scores, out + dim);
        for (int64_t c = 0; c < dim; c += LANES) {
            vf sum = {};
            for (int p = 0; p < seen; p++) sum += scores[p] * load(values + p * dim + c);
            store(out + c, sum);
        }
    }
}

/* One query's stretches into one output [D]. */
static void join_stretches(const struct attention_work *work, int head, int query, float *out) {
    int64_t dim = work->net->dim;
    int queries = work->tokens * work->net->heads / work->net->kv_heads;
    const float *first = work->partial + ((int64_t)head * work->stretches * queries + query) * (dim + 2);
    int64_t step = queries * (dim + 2);
    float most = -INFINITY, total = 0;
    for (int s = 0; s < work->stretches; s++)
        if (first[s * step + dim] > most) most = first[s * step + dim];
    memset(out, 0, (size_t)dim * sizeof *out);
    for (int s = 0; s < work->stretches; s++) {
        const float *part = first + s * step;
        if (part[dim + 1] == 0) continue;
        float scale = expf(part[dim] - most);
        total += scale * part[dim + 1];
        for (int64_t i = 0; i < dim; i++) out[i] += scale * part[i];
    }
    for (int64_t i = 0; i < dim; i++) out[i] /= total;
}
