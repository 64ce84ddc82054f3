/* What lies between the products of a prompt, for many rows at once. */

static pthread_mutex_t one_call = PTHREAD_MUTEX_INITIALIZER;

#define SOME_ROWS 16

typedef void row_work(void *argument, int64_t row);

struct rows {
    row_work *function;
    void *argument;
    int count;
};

static void some_rows(void *argument, int item) {
    const struct rows *rows = argument;
    int64_t from = (int64_t)item * SOME_ROWS;
    for (int64_t row = from; row < from + SOME_ROWS && row < rows->count; row++) rows->function(rows->argument, row);
}

/* Call `function` for rows 0 to count - 1, on all threads. */
static void run_rows(row_work *function, void *argument, int count) {
    pthread_mutex_lock(&one_call);
    uint64_t mode = flush_subnormals();
    struct rows rows = {function, argument, count};
    parallel(some_rows, &rows, (count + SOME_ROWS - 1) / SOME_ROWS);
    restore_subnormals(mode);
    pthread_mutex_unlock(&one_call);
}

/* out = x / rms(x) * weight */
struct norm_work {
    const float *x, *weight;
    int64_t width;
    float eps;
    float *out;
};

static void norm_row(void *argument, int64_t row) {
    const struct norm_work *w = argument;
    int64_t at = row * w->width;
    rms_norm(w->out + at, w->x + at, w->weight, w->width, w->eps);
}

/* out = silu(gate) * up; any width */
struct gate_work {
    const float *gate, *up;
    int64_t width;
    float *out;
};

static void gate_row(void *argument, int64_t row) {
    const struct gate_work *w = argument;
    int64_t at = row * w->width, i = 0;
    for (; i + LANES <= w->width; i += LANES) {
        vf gate = load(w->gate + at + i);
        store(w->out + at + i, gate * sigmoids(gate) * load(w->up + at + i));
    }
    for (; i < w->width; i++) w->out[at + i] = w->gate[at + i] * sigmoid(w->gate[at + i]) * w->up[at + i];
}

/* Causal softmax in place over scores [H, T, width]; the last T columns are those of the rows' own tokens. */
struct softmax_work {
    float *scores;
    int64_t tokens, width;
};

/* e**x, and 0 below -60, where products with it would be subnormal. */
INLINE vf weight_of(vf x) { return as_floats((vu)exponential(x) & ~where_negative((vi)(x + 60.0f))); }

static void softmax_row(void *argument, int64_t row) {
    const struct softmax_work *w = argument;
    float *scores = w->scores + row * w->width, most = -INFINITY, total = 0;
    int64_t seen = w->width - w->tokens + row % w->tokens + 1, whole = seen & -LANES;
    for (int64_t i = 0; i < seen; i++) most = scores[i] > most ? scores[i] : most;
    vf totals = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        vf weights = weight_of(load(scores + i) - most);
        store(scores + i, weights);
        totals += weights;
    }
    for (int64_t i = whole; i < seen; i++) total += scores[i] = scores[i] - most < -60 ? 0 : expf(scores[i] - most);
    float scale = 1.0f / (total + sum(totals));
    for (int64_t i = 0; i < seen; i++) scores[i] *= scale;
    memset(scores + seen, 0, (size_t)(w->width - seen) * sizeof *scores);
}
