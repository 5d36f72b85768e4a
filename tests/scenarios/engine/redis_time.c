/* Preloaded into redis-server: its time of day is what a file says, so TIME, expiries and scripts live in simulated time.
 *
 * Its event loop, which goes by CLOCK_MONOTONIC, stays in real time. libfaketime can't be used: it calls malloc before it
 * is set up, and jemalloc, with which Debian builds redis-server, asks for the time in its first malloc.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *now_us; /* microseconds since 1970; NULL: the real time */
static int (*real_clock)(clockid_t, struct timespec *); /* NULL until all libraries are there */

__attribute__((constructor)) static void open_clock(void) {
    const char *path = getenv("SIMULATED_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *now_us, PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    if (page != MAP_FAILED)
        now_us = page;
    *(void **)&real_clock = dlsym(RTLD_NEXT, "clock_gettime");
}

int clock_gettime(clockid_t clock, struct timespec *result) {
    if (!now_us || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE))
        return real_clock ? real_clock(clock, result) : syscall(SYS_clock_gettime, clock, result);
    int64_t us = *now_us;
    result->tv_sec = us / 1000000;
    result->tv_nsec = us % 1000000 * 1000;
    return 0;
}

int gettimeofday(struct timeval *restrict result, void *restrict zone) {
    (void)zone;
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    result->tv_sec = now.tv_sec;
    result->tv_usec = now.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}
