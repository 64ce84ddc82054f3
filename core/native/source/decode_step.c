/* One token, or a few, through a whole network of the Qwen3.5 family on a CPU.

   Weights are read as they are stored and widened in registers; everything else is float32. Weights and caches
   belong to the caller, who hands over their addresses; what is kept here is scratch memory. */

#include "vectors.h"
#include "threads.h"
#include "products.h"
#include "delta_net.h"
#include "attention.h"
#include "rows.h"

struct feed_forward {
    struct matrix gate, up, down;
    /* a mixture's: experts stand below each other in gate, up and down */
    struct matrix router, shared_gate, shared_expert_gate, shared_up, shared_down;
    int64_t experts, top, inner, shared_inner, renormalise;
};

struct layer {
    int64_t attends;
    const float *input_norm, *post_norm;
    struct delta_net delta;
    struct attention attention;
    struct feed_forward block;
};

struct network {
    int64_t hidden, vocabulary, layers, widest; /* widest: floats of any projection of a token */
    float eps;
    int32_t reserved;
    const float *norm;
    const struct layer *all;
    struct matrix embedding, head;
};

/* Of an attention layer keys and values [Hkv, capacity, D], of a delta net [K-1, channels] and [Hv, Dk, Dv],
   which stay as they are where `tentative` is filled instead. */
struct memory {
    float *first, *second;
    int64_t capacity;
    struct tentative tentative;
};

#define MAX_TAPS 64

/* Scratch memory of a call; the buffers below are cut from it. */
struct scratch {
    int tokens;
    int64_t shift;                /* of positions, after pictures */
    float *x, *normed, *attended; /* [T, hidden], [T, hidden], [T, widest] */
    float *projected[4];          /* [T, widest] each */
    float *window, *mixed;
    struct input input, inner;
    void *owned;
};

static float *cut(float **from, int64_t count) {
    float *start = *from;
    *from += (count + LANES - 1) & -LANES;
    return start;
}

static int open_scratch(struct scratch *s, const struct network *net, int tokens) {
    int64_t widest = blocks_of(net->widest > net->hidden ? net->widest : net->hidden) * BLOCK, rows = tokens, padded = tokens > 1 ? MAX_ROWS : 1;
    size_t total = (size_t)((rows * 9 + padded * 4 + MAX_TAPS) * widest);
    float *next = s->owned = malloc((total + 16 * LANES) * sizeof *next);
    if (!next) return -1;
    s->tokens = tokens;
    memset(next, 0, tokens > 1 ? (size_t)(padded * widest * 4) * sizeof *next : 0);
    s->input = (struct input){0, 0, cut(&next, padded * widest), cut(&next, padded * widest)};
    s->inner = (struct input){0, 0, cut(&next, padded * widest), cut(&next, padded * widest)};
    s->x = cut(&next, rows * widest);
    s->normed = cut(&next, rows * widest);
    s->attended = cut(&next, rows * widest);
    for (int i = 0; i < 4; i++) s->projected[i] = cut(&next, rows * widest);
    s->mixed = cut(&next, rows * widest);
    s->window = cut(&next, (rows + MAX_TAPS) * widest);
    return 0;
}

/* The input of a layer's next products: the norm of x. */
static void set_normed(struct scratch *s, const struct network *net, const float *weight) {
    for (int t = 0; t < s->tokens; t++)
        rms_norm(s->normed + t * net->hidden, s->x + t * net->hidden, weight, net->hidden, net->eps);
    set_input(&s->input, s->normed, s->tokens, net->hidden, net->hidden);
}

/* x += matrix * rows of `values` */
static void add_product(struct scratch *s, const struct network *net, const struct matrix *m, const float *values) {
    set_input(&s->inner, values, s->tokens, m->columns, m->columns);
    struct product out = product_of(m, &s->inner, s->x, net->hidden, ADD);
    multiply(&out, 1);
}

static int delta_layer(struct scratch *s, const struct network *net, const struct delta_net *d, struct memory *memory) {
    int64_t channels = d->qkv.rows, before = d->taps - 1;
    int is_tentative = memory->tentative.window != NULL;
    float *window = is_tentative ? memory->tentative.window : s->window;
    memcpy(window, memory->first, (size_t)(before * channels) * sizeof *window);
    struct product in[] = {
        product_of(&d->qkv, &s->input, window + before * channels, channels, STORE),
        product_of(&d->z, &s->input, s->projected[1], d->z.rows, STORE),
        product_of(&d->a, &s->input, s->projected[2], d->a.rows, STORE),
        product_of(&d->b, &s->input, s->projected[3], d->b.rows, STORE),
    };
    multiply(in, 4);
    struct delta_work work = {
        d, s->tokens, net->eps, window, s->projected[1], s->projected[2], s->projected[3], s->mixed, s->attended,
        s->projected[0], memory->second, is_tentative ? &memory->tentative : NULL,
    };
    delta_rule(&work);
    if (!is_tentative)
        memcpy(memory->first, window + s->tokens * channels, (size_t)(before * channels) * sizeof *window);
    add_product(s, net, &d->out, s->attended);
    return 0;
}

/* Queries and gates as projected [T, H, 2D] to queries [Hkv, T * r, D]; keys and values into the cache. */
static void place_heads(struct scratch *s, const struct network *net, const struct attention *a, struct memory *memory, int64_t position) {
    int64_t dim = a->dim, shared = a->heads / a->kv_heads;
    float scale = 1.0f / sqrtf((float)dim);
    for (int t = 0; t < s->tokens; t++) {
        for (int h = 0; h < a->heads; h++) {
            float *q = s->mixed + ((h / shared * s->tokens + t) * shared + h % shared) * dim;
            memcpy(q, s->projected[0] + (t * a->heads + h) * 2 * dim, (size_t)dim * sizeof *q);
            place_head(q, a, a->q_norm, position + s->shift + t, net->eps);
            for (int64_t i = 0; i < dim; i++) q[i] *= scale;
        }
        for (int h = 0; h < a->kv_heads; h++) {
            int64_t to = (h * memory->capacity + position + t) * dim, from = (t * a->kv_heads + h) * dim;
            memcpy(memory->first + to, s->projected[1] + from, (size_t)dim * sizeof(float));
            place_head(memory->first + to, a, a->k_norm, position + s->shift + t, net->eps);
            memcpy(memory->second + to, s->projected[2] + from, (size_t)dim * sizeof(float));
        }
    }
}

static int attention_layer(struct scratch *s, const struct network *net, const struct attention *a, struct memory *memory, int64_t position) {
    struct product in[] = {
        product_of(&a->q, &s->input, s->projected[0], a->q.rows, STORE),
        product_of(&a->k, &s->input, s->projected[1], a->k.rows, STORE),
        product_of(&a->v, &s->input, s->projected[2], a->v.rows, STORE),
    };
    multiply(in, 3);
    place_heads(s, net, a, memory, position);
    int stretches = (int)((position + s->tokens + STRETCH - 1) / STRETCH), shared = a->heads / a->kv_heads;
    size_t count = (size_t)stretches * (size_t)(a->heads * s->tokens) * (size_t)(a->dim + 2);
    float *partial = malloc(count * sizeof *partial);
    if (!partial) return -1;
    struct attention_work work = {
        a, s->tokens, stretches, position, memory->capacity, memory->first, memory->second, s->mixed, partial,
    };
    parallel(attend_stretch, &work, a->kv_heads * stretches);
    for (int t = 0; t < s->tokens; t++)
        for (int h = 0; h < a->heads; h++) {
            float *out = s->attended + (t * a->heads + h) * a->dim;
            const float *gate = s->projected[0] + ((t * a->heads + h) * 2 + 1) * a->dim;
            join_stretches(&work, h / shared, (int)(t * shared + h % shared), out);
            for (int64_t i = 0; i < a->dim; i += LANES) store(out + i, load(out + i) * sigmoids(load(gate + i)));
        }
    free(partial);
    add_product(s, net, &a->out, s->attended);
    return 0;
}

static void dense_block(struct scratch *s, const struct network *net, const struct matrix *gate, const struct matrix *up, const struct matrix *down) {
    struct product inner = product_of(gate, &s->input, s->projected[0], gate->rows, GATE);
    inner.up = up;
    multiply(&inner, 1);
    add_product(s, net, down, s->projected[0]);
}

/* The best experts of one token and their shares of a softmax over all. */
static void route(const struct feed_forward *f, float *logits, int *chosen, float *shares) {
    float most = -INFINITY, total = 0, kept = 0;
    for (int64_t e = 0; e < f->experts; e++)
        if (logits[e] > most) most = logits[e];
    for (int64_t e = 0; e < f->experts; e++) total += logits[e] = expf(logits[e] - most);
    for (int64_t i = 0; i < f->top; i++) {
        int best = 0;
        for (int e = 1; e < f->experts; e++)
            if (logits[e] > logits[best]) best = e;
        chosen[i] = best;
        kept += shares[i] = logits[best] / total;
        logits[best] = -1;
    }
    for (int64_t i = 0; f->renormalise && i < f->top; i++) shares[i] /= kept;
}

/* x += the chosen experts of every token, weighed, and the shared expert behind its gate. */
static int expert_block(struct scratch *s, const struct network *net, const struct feed_forward *f) {
    int64_t choices = f->top * s->tokens, width = blocks_of(f->inner) * BLOCK;
    size_t floats = (size_t)(choices * (f->inner + 2 * width + net->hidden + 1) + s->tokens * net->hidden);
    float *owned = malloc(floats * sizeof *owned), *next = owned;
    int *chosen = malloc((size_t)choices * sizeof *chosen);
    struct product *jobs = malloc((size_t)(choices + 1) * sizeof *jobs);
    struct input *inputs = malloc((size_t)(choices + s->tokens) * sizeof *inputs);
    if (!owned || !chosen || !jobs || !inputs) {
        free(owned), free(chosen), free(jobs), free(inputs);
        return -1;
    }
    float *hidden = next, *natural = hidden + choices * f->inner, *lanes = natural + choices * width;
    float *found = lanes + choices * width, *shares = found + choices * net->hidden, *shared = shares + choices;
    float *shared_gates = s->projected[2];
    struct product gates[] = {
        product_of(&f->router, &s->input, s->projected[1], f->experts, STORE),
        product_of(&f->shared_gate, &s->input, shared_gates, 1, STORE),
    };
    multiply(gates, 2);
    for (int t = 0; t < s->tokens; t++) {
        inputs[choices + t] = one_row(&s->input, t);
        route(f, s->projected[1] + t * f->experts, chosen + t * f->top, shares + t * f->top);
    }
    for (int64_t c = 0; c < choices; c++) {
        jobs[c] = product_of(&f->gate, inputs + choices + c / f->top, hidden + c * f->inner, f->inner, GATE);
        jobs[c].up = &f->up, jobs[c].first = chosen[c] * f->inner, jobs[c].rows = f->inner;
    }
    jobs[choices] = product_of(&f->shared_expert_gate, &s->input, s->projected[0], f->shared_inner, GATE);
    jobs[choices].up = &f->shared_up;
    multiply(jobs, (int)choices + 1);
    for (int64_t c = 0; c < choices; c++) {
        inputs[c] = (struct input){1, 0, natural + c * width, lanes + c * width};
        set_input(inputs + c, hidden + c * f->inner, 1, f->inner, f->inner);
        jobs[c] = product_of(&f->down, inputs + c, found + c * net->hidden, net->hidden, STORE);
        jobs[c].first = chosen[c] * net->hidden, jobs[c].rows = net->hidden;
    }
    set_input(&s->inner, s->projected[0], s->tokens, f->shared_inner, f->shared_inner);
    jobs[choices] = product_of(&f->shared_down, &s->inner, shared, net->hidden, STORE);
    multiply(jobs, (int)choices + 1);
    for (int t = 0; t < s->tokens; t++) {
        float gate = sigmoid(shared_gates[t]), *x = s->x + t * net->hidden;
        for (int64_t i = 0; i < net->hidden; i++) x[i] += gate * shared[t * net->hidden + i];
        for (int64_t c = t * f->top; c < (t + 1) * f->top; c++)
            for (int64_t i = 0; i < net->hidden; i++) x[i] += shares[c] * found[c * net->hidden + i];
    }
    free(owned), free(chosen), free(jobs), free(inputs);
    return 0;
}

static int run_layer(struct scratch *s, const struct network *net, const struct layer *layer, struct memory *memory, int64_t position) {
    set_normed(s, net, layer->input_norm);
    int failed = layer->attends ? attention_layer(s, net, &layer->attention, memory, position)
                                : delta_layer(s, net, &layer->delta, memory);
    if (failed) return failed;
    set_normed(s, net, layer->post_norm);
    if (layer->block.experts) return expert_block(s, net, &layer->block);
    dense_block(s, net, &layer->block.gate, &layer->block.up, &layer->block.down);
    return 0;
}

/* --- what is called from outside --- */

#define PUBLIC __attribute__((visibility("default")))

/* The sizes of the structures that callers fill. */
PUBLIC void qchat_sizes(int64_t sizes[4]) {
    sizes[0] = sizeof(struct matrix), sizes[1] = sizeof(struct layer);
    sizes[2] = sizeof(struct network), sizes[3] = sizeof(struct memory);
}

PUBLIC int qchat_threads(int wanted) {
    pthread_mutex_lock(&one_call);
    int got = start_threads(wanted);
    pthread_mutex_unlock(&one_call);
    return got;
}

/* Whether there are functions for the form of this matrix. */
PUBLIC int qchat_takes(const struct matrix *m) { return form_of(m) != NULL; }

/* Read `tokens` ids after `position` others into the memories, rotated by `shift` more; hidden states [T, hidden] after the final norm.
   Returns 0, or -1 without memory, which leaves the caches undefined. */
PUBLIC int qchat_step(const struct network *net, struct memory *memories, const int32_t *ids, int tokens, int64_t position, int64_t shift, float *hidden) {
    pthread_mutex_lock(&one_call);
    struct scratch s;
    int failed = open_scratch(&s, net, tokens);
    s.shift = shift;
    uint64_t mode = flush_subnormals();
    for (int t = 0; !failed && t < tokens; t++)
        form_of(&net->embedding)->widen(&net->embedding, ids[t], s.x + t * net->hidden);
    for (int64_t i = 0; !failed && i < net->layers; i++)
        failed = run_layer(&s, net, net->all + i, memories + i, position);
    for (int t = 0; !failed && t < tokens; t++)
        rms_norm(hidden + t * net->hidden, s.x + t * net->hidden, net->norm, net->hidden, net->eps);
    restore_subnormals(mode);
    free(s.owned);
    pthread_mutex_unlock(&one_call);
    return failed;
}

/* out [T, N] = x [T, K] times the matrix [N, K] transposed. Returns 0, or -1 without memory. */
PUBLIC int qchat_product(const struct matrix *m, const float *x, int rows, float *out) {
    int64_t width = blocks_of(m->columns) * BLOCK * (rows > 1 ? MAX_ROWS : 1);
    float *owned = calloc((size_t)(2 * width), sizeof *owned);
    if (!owned) return -1;
    pthread_mutex_lock(&one_call);
    uint64_t mode = flush_subnormals();
    struct input in = {rows, 0, owned, owned + width};
    set_input(&in, x, rows, m->columns, m->columns);
    struct product product = product_of(m, &in, out, m->rows, STORE);
    multiply(&product, 1);
    restore_subnormals(mode);
    pthread_mutex_unlock(&one_call);
    free(owned);
    return 0;
}

/* The gated delta net between its projections, for any number of tokens: `window` [taps - 1 + T, channels], z
   [T, Hv * Dv], a and b [T, Hv] to out [T, Hv * Dv]; the state moves on by T. Returns 0, or -1 without memory. */
PUBLIC int qchat_delta_rule(
    const struct delta_net *net, float eps, int tokens, const float *window, const float *z, const float *a,
    const float *b, float *state, float *out
) {
    int64_t mixed = tokens * channels_of(net);
    float *owned = malloc((size_t)(mixed + 2 * tokens * net->value_heads) * sizeof *owned);
    if (!owned) return -1;
    pthread_mutex_lock(&one_call);
    uint64_t mode = flush_subnormals();
    struct delta_work work = {net, tokens, eps, window, z, a, b, owned, out, owned + mixed, state, NULL};
    delta_rule(&work);
    restore_subnormals(mode);
    pthread_mutex_unlock(&one_call);
    free(owned);
    return 0;
}

/* The state [Hv, Dk, Dv] after the first `tokens` of a tentative call, MAX_ROWS at most, which left keys, decays
   and updates as in `struct tentative`. */
PUBLIC void qchat_delta_commit(
    const struct delta_net *net, int tokens, const float *keys, const float *decays, const float *updates, float *state
) {
    struct commit_work work = {net, tokens, keys, decays, updates, state};
    int64_t width = STRIP * LANES, strips = (net->value_dim + width - 1) / width;
    pthread_mutex_lock(&one_call);
    uint64_t mode = flush_subnormals();
    parallel(commit_strip, &work, (int)(net->value_heads * strips));
    restore_subnormals(mode);
    pthread_mutex_unlock(&one_call);
}

/* For all rows of a prompt at once: see rows.h. Rows are [T, width]. */

PUBLIC void qchat_norm(const float *x, const float *weight, int rows, int width, float eps, float *out) {
    struct norm_work w = {x, weight, width, eps, out};
    run_rows(norm_row, &w, rows);
}

PUBLIC void qchat_gate(const float *gate, const float *up, int rows, int width, float *out) {
    struct gate_work w = {gate, up, width, out};
    run_rows(gate_row, &w, rows);
}

PUBLIC void qchat_softmax(float *scores, int rows, int tokens, int width) {
    struct softmax_work w = {scores, tokens, width};
    run_rows(softmax_row, &w, rows);
}

struct widening {
    const struct matrix *matrix;
    float *out;
};

static void widen_rows(void *argument, int item) {
    const struct widening *w = argument;
    const struct form *form = form_of(w->matrix);
    int64_t from = (int64_t)item * 64, to = from + 64 < w->matrix->rows ? from + 64 : w->matrix->rows;
    for (int64_t row = from; row < to; row++) form->widen(w->matrix, row, w->out + row * w->matrix->columns);
}

/* The whole matrix as float32 [N, K]. */
PUBLIC void qchat_widen(const struct matrix *m, float *out) {
    pthread_mutex_lock(&one_call);
    struct widening w = {m, out};
    parallel(widen_rows, &w, (int)((m->rows + 63) / 64));
    pthread_mutex_unlock(&one_call);
}
