/* Preloaded library that makes the n-th write, rename, fsync or creation of a file below a folder fail, or kills there.
 *
 * fault_arm(folder, calls, number, action): calls is a sum of WRITE 1, RENAME 2, SYNC 4, CREATE 8; number counts from 1,
 * 0 only counts; action is an errno, from then on if it is ENOSPC, EROFS or EIO; -1 kills; -2 writes half, once.
 * fault_count(): calls so far.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, RENAME = 2, SYNC = 4, CREATE = 8 };
static char root[4096];
static int which, number, action;
static volatile int count;

void fault_arm(const char *folder, int calls, int n, int what) {
    strncpy(root, folder, sizeof root - 1);
    which = calls; number = n; action = what; count = 0;
}
int fault_count(void) { return count; }

#define NEXT(name) static __typeof__(name) *next; if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int below(const char *path) { return root[0] && path && !strncmp(path, root, strlen(root)); }
static int below_fd(int fd) {
    char link[64], path[4096];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}
/* 0: go on; 1: fail with errno; 2: write half */
static int hit(int kind) {
    if (!(which & kind)) return 0;
    int now = __sync_add_and_fetch(&count, 1);
    if (!number || now < number) return 0;
    if (now > number && action != ENOSPC && action != EROFS && action != EIO) return 0;
    if (action == -1) kill(getpid(), SIGKILL);
    if (action == -2) return kind == WRITE ? 2 : 0;
    errno = action;
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    if (below_fd(fd)) {
        int what = hit(WRITE);
        if (what == 1) return -1;
        if (what == 2) size = size / 2 + (size == 1);
    }
    return next(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    NEXT(pwrite64);
    if (below_fd(fd)) {
        int what = hit(WRITE);
        if (what == 1) return -1;
        if (what == 2) size = size / 2 + (size == 1);
    }
    return next(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }
size_t fwrite(const void *data, size_t size, size_t items, FILE *file) {
    NEXT(fwrite);
    if (below_fd(fileno(file))) {
        int what = hit(WRITE);
        if (what == 1) return 0;
        if (what == 2) items = items / 2;
    }
    return next(data, size, items, file);
}
ssize_t writev(int fd, const struct iovec *parts, int parts_count) {
    NEXT(writev);
    if (below_fd(fd) && hit(WRITE) == 1) return -1;
    return next(fd, parts, parts_count);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    if (below_fd(out) && hit(WRITE) == 1) return -1;
    return next(in, from, out, to, size, flags);
}
#include <sys/sendfile.h>
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    NEXT(sendfile64);
    if (below_fd(out) && hit(WRITE) == 1) return -1;
    return next(out, in, at, size);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) { return sendfile64(out, in, (off64_t *)at, size); }
int rename(const char *from, const char *to) {
    NEXT(rename);
    return below(to) && hit(RENAME) == 1 ? -1 : next(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    NEXT(renameat);
    return below(to) && hit(RENAME) == 1 ? -1 : next(a, from, b, to);
}
int fsync(int fd) {
    NEXT(fsync);
    return below_fd(fd) && hit(SYNC) == 1 ? -1 : next(fd);
}
static int created(const char *path, int flags) { return (flags & O_CREAT) && below(path) && hit(CREATE) == 1; }
int open64(const char *path, int flags, ...) {
    NEXT(open64);
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    return created(path, flags) ? -1 : next(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    NEXT(open);
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    return created(path, flags) ? -1 : next(path, flags, mode);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    return below(path) && hit(CREATE) == 1 ? -1 : next(path, mode);
}
