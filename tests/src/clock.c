/* Preloaded into a program, this library adds an offset to its wall clock. The offset is a number
 * of seconds, in 8 bytes, in the file that CLOCK_OFFSET names. A write to that file makes the clock
 * jump. Monotonic clocks are not changed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset;
/* The offset in the last time that this thread got. */
static _Thread_local int64_t added;
static int (*real_clock_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *mapped = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    *(void **)&real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    if (mapped == MAP_FAILED || real_clock_gettime == NULL)
        abort(); /* without the offset the test would prove nothing */
    offset = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (offset == NULL)
        begin(); /* the constructor of another library may call this before ours has run */
    int result = real_clock_gettime(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += added = *offset;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}

time_t time(time_t *result) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (result)
        *result = precise.tv_sec;
    return precise.tv_sec;
}

/* The Kafka client waits until a time of day that it computes from its clock. The kernel has the
 * real time, so the offset is removed again. */
int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    struct timespec real_until = { until->tv_sec - added, until->tv_nsec };
    return pthread_cond_clockwait(condition, mutex, CLOCK_REALTIME, &real_until);
}

int cnd_timedwait(cnd_t *restrict condition, mtx_t *restrict mutex, const struct timespec *restrict until) {
    int result = pthread_cond_timedwait((pthread_cond_t *)condition, (pthread_mutex_t *)mutex, until);
    return result == 0 ? thrd_success : result == ETIMEDOUT ? thrd_timedout : thrd_error;
}
