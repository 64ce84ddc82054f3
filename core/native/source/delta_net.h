/* The gated delta net between its projections, for a few tokens, one after another.

   With m = a S^T k: S' = a S + k (beta (v - m))^T, and the output is a S^T q + (q . k) beta (v - m). */

struct delta_net {
    int32_t key_heads, value_heads, key_dim, value_dim, taps, reserved;
    /* [taps, channels], [Dv], [Hv], [Hv], all float32 */
    const float *conv, *norm, *log_a, *dt_bias;
    struct matrix qkv, z, a, b, out;
};

/* What tokens that may not count leave behind: window [K-1+T, channels], keys [T, Hk, Dk], log decays [T, Hv],
   updates [T, Hv, Dv]. */
struct tentative {
    float *window, *keys, *decays, *updates;
};

/* One layer, one call. Projections [T, ...]; queries and keys [T, 2, Hk, Dk] are normalised in `mixed`. */
struct delta_work {
    const struct delta_net *net;
    int tokens;
    float eps;
    const float *z, *a, *b;
    float *mixed, *out; /* [T, channels], [T, Hv * Dv] */
    float *state;       /* [Hv, Dk, Dv] */
    const struct tentative *tentative;
};

/* out[t] = silu of the convolution of window rows t ... t + taps - 1, for channels [channels] */
static void convolve(const struct delta_net *net, const float *window, int64_t channels, int tokens, float *out) {
    for (int t = 0; t < tokens; t++) {
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES) {
            vf total = {};
            for (int i = 0; i < net->taps; i++)
                total += load(window + (t + i) * channels + c) * load(net->conv + i * channels + c);
            store(out + t * channels + c, total * sigmoids(total));
        }
    }
}

/* Bring each head of n floats to length `scale`. */
static void normalise_heads(float *x, int heads, int64_t n, float scale) {
    for (int h = 0; h < heads; h++) {
        float *head = x + h * n;
        float factor = scale / sqrtf(dot(head, head, n) + 1e-6f);
        for (int64_t i = 0; i < n; i++) head[i] *= factor;
    }
}

static float softplus(float x) { return x > 0 ? x + log1pf(expf(-x)) : log1pf(expf(x)); }

#define STRIP 4 /* vectors: 64 columns of a state of 128 rows stay in the first cache */

/* One token and `count` vectors of a head's columns. */
INLINE void step_columns(
    int count, float *state, int64_t key_dim, int64_t value_dim, const float *q, const float *k, const float *v,
    float decay, float beta, float overlap, float *out, float *update
) {
    vf of_query[STRIP] = {0}, of_key[STRIP] = {0};
    for (int64_t i = 0; i < key_dim; i++)
        for (int j = 0; j < count; j++) {
            vf s = load(state + i * value_dim + j * LANES);
            of_query[j] += s * q[i];
            of_key[j] += s * k[i];
        }
    for (int j = 0; j < count; j++) {
        of_key[j] = beta * (load(v + j * LANES) - decay * of_key[j]);
        store(out + j * LANES, decay * of_query[j] + overlap * of_key[j]);
        store(update + j * LANES, of_key[j]);
    }
    for (int64_t i = 0; i < key_dim; i++)
        for (int j = 0; j < count; j++) {
            float *place = state + i * value_dim + j * LANES;
            store(place, decay * load(place) + k[i] * of_key[j]);
        }
}

static void head_token(const struct delta_work *work, int head, int t, float *update) {
    const struct delta_net *net = work->net;
    int64_t key_dim = net->key_dim, value_dim = net->value_dim, keys = net->key_heads * key_dim;
    int64_t channels = 2 * keys + net->value_heads * value_dim, place = t * net->value_heads + head;
    const float *row = work->mixed + t * channels;
    const float *q = row + head / (net->value_heads / net->key_heads) * key_dim, *k = q + keys;
    const float *v = row + 2 * keys + head * value_dim;
    float *state = work->state + head * key_dim * value_dim, *out = work->out + place * value_dim;
    float log_decay = -expf(net->log_a[head]) * softplus(work->a[place] + net->dt_bias[head]);
    float decay = expf(log_decay), beta = sigmoid(work->b[place]), overlap = dot(q, k, key_dim);
    int64_t c = 0;
    for (; c + STRIP * LANES <= value_dim; c += STRIP * LANES)
        step_columns(STRIP, state + c, key_dim, value_dim, q, k, v + c, decay, beta, overlap, out + c, update + c);
    for (; c < value_dim; c += LANES)
        step_columns(1, state + c, key_dim, value_dim, q, k, v + c, decay, beta, overlap, out + c, update + c);
    if (work->tentative) work->tentative->decays[place] = log_decay;
    rms_norm(out, out, net->norm, value_dim, work->eps);
    for (c = 0; c < value_dim; c += LANES) {
        vf gate = load(work->z + place * value_dim + c);
        store(out + c, load(out + c) * (gate * sigmoids(gate)));
    }
}

static void delta_head(void *argument, int head) {
    const struct delta_work *work = argument;
    int64_t value_dim = work->net->value_dim;
    float unused[value_dim];
    for (int t = 0; t < work->tokens; t++) {
        int64_t at = (t * work->net->value_heads + head) * value_dim;
        head_token(work, head, t, work->tentative ? work->tentative->updates + at : unused);
    }
}

/* Outputs into work->out from the convolution's `window` [taps - 1 + T, channels]; work->state moves on by T. */
static void delta_rule(struct delta_work *work, const float *window) {
    const struct delta_net *net = work->net;
    int64_t key_dim = net->key_dim, keys = net->key_heads * key_dim;
    int64_t channels = 2 * keys + net->value_heads * net->value_dim;
    convolve(net, window, channels, work->tokens, work->mixed);
    for (int t = 0; t < work->tokens; t++) {
        float *q = work->mixed + t * channels;
        normalise_heads(q, net->key_heads, key_dim, 1.0f / sqrtf((float)key_dim));
        normalise_heads(q + keys, net->key_heads, key_dim, 1.0f);
        if (work->tentative)
            memcpy(work->tentative->keys + t * keys, q + keys, (size_t)keys * sizeof *q);
    }
    parallel(delta_head, work, net->value_heads);
}
