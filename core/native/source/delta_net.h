/* The gated delta net between its projections, one token after another.

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

/* One layer, one call. */
struct delta_work {
    const struct delta_net *net;
    int tokens;
    float eps;
    const float *window;    /* [taps - 1 + T, channels]: inputs of the convolution */
    const float *z, *a, *b; /* [T, Hv * Dv], [T, Hv], [T, Hv] */
    float *mixed, *out;     /* [T, channels], [T, Hv * Dv] */
    float *gates;           /* [T, Hv, 2]: decay and beta */
    float *state;           /* [Hv, Dk, Dv]; stays as it is where tokens are tentative */
    const struct tentative *tentative;
};

#define STRIP 4       /* vectors: 64 columns of a state of 128 rows stay in the first cache */
#define SOME_TOKENS 16 /* of one item, where tokens do not depend on each other */

static int64_t channels_of(const struct delta_net *net) {
    return 2 * net->key_heads * net->key_dim + net->value_heads * net->value_dim;
}

/* out = silu of the convolution of the rows of `window` from this token's first on; channels divide by LANES. */
static void convolve(const struct delta_net *net, const float *window, int64_t channels, float *out) {
    for (int64_t c = 0; c < channels; c += LANES) {
        vf total = {};
        for (int i = 0; i < net->taps; i++) total += load(window + i * channels + c) * load(net->conv + i * channels + c);
        store(out + c, total * sigmoids(total));
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

/* What the rule needs of one token: queries, keys and values, decays and betas. */
static void prepare_token(const struct delta_work *work, int64_t t) {
    const struct delta_net *net = work->net;
    int64_t channels = channels_of(net), keys = net->key_heads * net->key_dim;
    float *q = work->mixed + t * channels;
    convolve(net, work->window + t * channels, channels, q);
    normalise_heads(q, net->key_heads, net->key_dim, 1.0f / sqrtf((float)net->key_dim));
    normalise_heads(q + keys, net->key_heads, net->key_dim, 1.0f);
    for (int64_t h = 0; h < net->value_heads; h++) {
        int64_t place = t * net->value_heads + h;
        float log_decay = -expf(net->log_a[h]) * softplus(work->a[place] + net->dt_bias[h]);
        work->gates[2 * place] = expf(log_decay);
        work->gates[2 * place + 1] = sigmoid(work->b[place]);
        if (work->tentative) work->tentative->decays[place] = log_decay;
    }
    if (work->tentative) memcpy(work->tentative->keys + t * keys, q + keys, (size_t)keys * sizeof *q);
}

/* Gated norm of one token's outputs. */
static void finish_token(const struct delta_work *work, int64_t t) {
    int64_t dim = work->net->value_dim;
    for (int64_t h = 0; h < work->net->value_heads; h++) {
        int64_t at = (t * work->net->value_heads + h) * dim;
        float *out = work->out + at;
        rms_norm(out, out, work->net->norm, dim, work->eps);
        for (int64_t c = 0; c < dim; c += LANES) {
            vf gate = load(work->z + at + c);
            store(out + c, load(out + c) * (gate * sigmoids(gate)));
        }
    }
}

static void prepare_tokens(void *argument, int item) {
    const struct delta_work *work = argument;
    for (int64_t t = item * SOME_TOKENS; t < (item + 1) * SOME_TOKENS && t < work->tokens; t++) prepare_token(work, t);
}

static void finish_tokens(void *argument, int item) {
    const struct delta_work *work = argument;
    for (int64_t t = item * SOME_TOKENS; t < (item + 1) * SOME_TOKENS && t < work->tokens; t++) finish_token(work, t);
}

/* One token and `count` vectors of a head's columns, whose rows are `stride` floats apart. */
INLINE void step_columns(
    int count, float *state, int64_t key_dim, int64_t stride, const float *q, const float *k, const float *v,
    float decay, float beta, float overlap, float *out, float *update
) {
    vf of_query[STRIP] = {0}, of_key[STRIP] = {0};
    for (int64_t i = 0; i < key_dim; i++)
        for (int j = 0; j < count; j++) {
            vf s = load(state + i * stride + j * LANES);
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
            float *place = state + i * stride + j * LANES;
            store(place, decay * load(place) + k[i] * of_key[j]);
        }
}

/* All tokens through `count` vectors of one head's columns, from column c on. Tentative ones run on a copy of
   these columns, which stays in the first cache: the state is read once and not written. */
INLINE void run_columns(const struct delta_work *work, int64_t head, int64_t c, int count) {
    const struct delta_net *net = work->net;
    int64_t key_dim = net->key_dim, value_dim = net->value_dim, channels = channels_of(net);
    int64_t q_at = head / (net->value_heads / net->key_heads) * key_dim, keys = net->key_heads * key_dim;
    float *state = work->state + head * key_dim * value_dim + c, unused[STRIP * LANES];
    int64_t stride = value_dim, width = count * LANES;
    float copy[work->tentative ? key_dim * width : 1];
    if (work->tentative) {
        for (int64_t i = 0; i < key_dim; i++) memcpy(copy + i * width, state + i * stride, (size_t)width * sizeof *copy);
        state = copy, stride = width;
    }
    for (int64_t t = 0; t < work->tokens; t++) {
        const float *row = work->mixed + t * channels, *q = row + q_at, *k = q + keys;
        const float *v = row + 2 * keys + head * value_dim + c;
        int64_t place = t * net->value_heads + head, at = place * value_dim + c;
        const float *gates = work->gates + 2 * place;
        float *update = work->tentative ? work->tentative->updates + at : unused;
        step_columns(count, state, key_dim, stride, q, k, v, gates[0], gates[1], dot(q, k, key_dim), work->out + at, update);
    }
}

static void run_strip(void *argument, int item) {
    const struct delta_work *work = argument;
    int64_t width = STRIP * LANES, dim = work->net->value_dim, strips = (dim + width - 1) / width;
    int64_t head = item / strips, c = item % strips * width;
    if (c + width <= dim) run_columns(work, head, c, STRIP);
    else
        for (; c < dim; c += LANES) run_columns(work, head, c, 1);
}

/* The first of the tokens that a tentative run left, which count after all. */
struct commit_work {
    const struct delta_net *net;
    int tokens;
    const float *keys, *decays, *updates;
    float *state;
};

/* S' = a S + sum over t of a_t k_t u_t^T, where a and a_t are the products of all decays and of those after t. */
static void commit_strip(void *argument, int item) {
    const struct commit_work *work = argument;
    const struct delta_net *net = work->net;
    int64_t width = STRIP * LANES, dim = net->value_dim, strips = (dim + width - 1) / width;
    int64_t head = item / strips, from = item % strips * width, to = from + width < dim ? from + width : dim;
    int64_t key_head = head / (net->value_heads / net->key_heads), keys = net->key_heads * net->key_dim;
    float *state = work->state + head * net->key_dim * dim, after[MAX_ROWS], log_decay = 0;
    for (int t = work->tokens - 1; t >= 0; t--) {
        after[t] = expf(log_decay);
        log_decay += work->decays[t * net->value_heads + head];
    }
    float decay = expf(log_decay);
    for (int64_t i = 0; i < net->key_dim; i++)
        for (int64_t c = from; c < to; c += LANES) {
            vf total = decay * load(state + i * dim + c);
            for (int t = 0; t < work->tokens; t++) {
                float key = work->keys[t * keys + key_head * net->key_dim + i] * after[t];
                total += key * load(work->updates + (t * net->value_heads + head) * dim + c);
            }
            store(state + i * dim + c, total);
        }
}

/* Outputs into work->out; work->state moves on by T. */
static void delta_rule(struct delta_work *work) {
    int64_t strips = (work->net->value_dim + STRIP * LANES - 1) / (STRIP * LANES);
    int some = (work->tokens + SOME_TOKENS - 1) / SOME_TOKENS;
    parallel(prepare_tokens, work, some);
    parallel(run_strip, work, (int)(work->net->value_heads * strips));
    parallel(finish_tokens, work, some);
}
