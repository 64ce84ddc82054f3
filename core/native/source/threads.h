/* A few threads that share the items of one job after another, the caller among them.

   Items are claimed one by one, so a thread that the system has not woken yet, or has put aside, holds up at
   most the item in its hands. Threads spin for some microseconds after a job and then sleep. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#if defined(__x86_64__)
#define RELAX() _mm_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

#define MAX_THREADS 256
#define SPINS 4000   /* some 50 us: longer than what lies between two jobs of a step */
#define PATIENCE 2000

typedef void work(void *argument, int item);

/* generation, items and claimed items in one word: a claim cannot belong to another job than it was made for */
#define CLAIMED(ticket) ((uint32_t)((ticket) & 0xffffff))
#define ITEMS(ticket) ((uint32_t)((ticket) >> 24 & 0xffffff))
#define MAX_ITEMS 0xffffff

static struct {
    _Atomic uint64_t ticket;
    _Atomic uint32_t finished;
    work *function;
    void *argument;
    _Atomic int sleeping;
    pthread_mutex_t lock;
    pthread_cond_t more;
    int threads; /* beside the caller */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER};

/* Let this thread flush subnormal numbers to zero; returns what to restore. */
static uint64_t flush_subnormals(void) {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1u << 24));
    return before;
#else
    return 0;
#endif
}

static void restore_subnormals(uint64_t before) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}

/* Do items until none is left. */
static void share(void) {
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    while (CLAIMED(ticket) < ITEMS(ticket)) {
        if (!atomic_compare_exchange_weak_explicit(
                &pool.ticket, &ticket, ticket + 1, memory_order_acq_rel, memory_order_acquire))
            continue;
        pool.function(pool.argument, (int)CLAIMED(ticket));
        atomic_fetch_add_explicit(&pool.finished, 1, memory_order_release);
        ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    }
}

static int has_work(void) {
    uint64_t ticket = atomic_load(&pool.ticket);
    return CLAIMED(ticket) < ITEMS(ticket);
}

static void *serve(void *unused) {
    flush_subnormals();
    for (;;) {
        for (int spin = 0; spin < SPINS && !has_work(); spin++) RELAX();
        if (!has_work()) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleeping, 1);
            while (!has_work()) pthread_cond_wait(&pool.more, &pool.lock);
            atomic_fetch_sub(&pool.sleeping, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        share();
    }
    return unused;
}

/* Call `function` for items 0 to items - 1, on all threads; returns when all are done. */
static void parallel(work *function, void *argument, int items) {
    if (pool.threads == 0 || items < 2) {
        for (int item = 0; item < items; item++) function(argument, item);
        return;
    }
    pool.function = function;
    pool.argument = argument;
    atomic_store_explicit(&pool.finished, 0, memory_order_relaxed);
    uint64_t generation = (atomic_load(&pool.ticket) >> 48) + 1;
    atomic_store(&pool.ticket, generation << 48 | (uint64_t)items << 24);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.more);
        pthread_mutex_unlock(&pool.lock);
    }
    share();
    for (int spin = 0; atomic_load_explicit(&pool.finished, memory_order_acquire) < (uint32_t)items; spin++)
        spin < PATIENCE ? (void)RELAX() : (void)sched_yield();
}

/* Have `wanted` threads in all, the caller included; they are never taken back. Returns how many there are. */
static int start_threads(int wanted) {
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    while (pool.threads + 1 < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, NULL)) break;
        pthread_detach(thread);
        pool.threads++;
    }
    return pool.threads + 1;
}
