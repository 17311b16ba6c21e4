/* Counts the calls that change files below a folder, and stops the process, or refuses, at the k-th.

   Preloaded (LD_PRELOAD), so that it sees Python, Rust and C++ alike. Armed by hb_arm in the process that is tested.
   A write that is killed has written half of its bytes before. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = 1, FULL = 2, DENIED = 3 };
enum { SPACE = 1, NAME = 2, SYNC = 4, REMOVE = 8 }; /* what a call needs: room, a right to names, the disk, neither */

static int armed, mode, log_fd = -1;
static long count, at;
static char root[PATH_MAX];
static size_t root_length;

void hb_arm(const char *folder, int how, long when, int trace) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    mode = how, at = when, log_fd = trace, count = 0, armed = 1;
}

long hb_count(void) { return count; }
void hb_disarm(void) { armed = 0; }

static int below(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void full(int dirfd, const char *path, char *out) {
    char base[PATH_MAX];
    ssize_t n = 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (dirfd == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
        n = readlink(link, base, sizeof base - 1);
        base[n < 0 ? 0 : n] = 0;
    }
    if (path[0])
        snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
    else
        snprintf(out, PATH_MAX, "%s", base);
}

/* 0: go on. -1: refuse, errno is set. 1: write half, then kill. */
static int hit(const char *what, const char *path, const char *other, int needs) {
    if (!armed || !(below(path) || (other && below(other)))) return 0;
    long k = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (log_fd >= 0) {
        char line[2 * PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%s\t%s\t%s\n", what, path, other ? other : "");
        syscall(SYS_write, log_fd, line, (size_t)n);
    }
    if (mode == KILL && k == at) {
        if (needs == SPACE && !strcmp(what, "write")) return 1;
        kill(getpid(), SIGKILL);
    }
    if (mode == FULL && k >= at && needs & (SPACE | SYNC)) return errno = ENOSPC, -1;
    if (mode == DENIED && k >= at && needs & NAME) return errno = EACCES, -1;
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name, dirfd, ...)                                                                \
    {                                                                                         \
        REAL(name);                                                                           \
        mode_t bits = 0;                                                                      \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                  \
            va_list list;                                                                     \
            va_start(list, flags);                                                            \
            bits = va_arg(list, mode_t);                                                      \
            va_end(list);                                                                     \
        }                                                                                     \
        if (armed && flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) {                       \
            char where[PATH_MAX];                                                             \
            full(dirfd, path, where);                                                         \
            int made = flags & O_CREAT && access(where, F_OK);                                \
            const char *word = made ? "create" : flags & O_TRUNC ? "truncate" : "open";       \
            if (hit(word, where, NULL, made ? SPACE | NAME : NAME) < 0) return -1;            \
        }                                                                                     \
        return real(__VA_ARGS__, bits);                                                       \
    }
int open(const char *path, int flags, ...) OPEN(open, AT_FDCWD, path, flags)
int open64(const char *path, int flags, ...) OPEN(open64, AT_FDCWD, path, flags)
int openat(int d, const char *path, int flags, ...) OPEN(openat, d, d, path, flags)
int openat64(int d, const char *path, int flags, ...) OPEN(openat64, d, d, path, flags)

#define TWO(word, name, at1, p1, at2, p2, ...)                                                \
    {                                                                                         \
        REAL(name);                                                                           \
        if (armed) {                                                                          \
            char from[PATH_MAX], to[PATH_MAX];                                                \
            full(at1, p1, from), full(at2, p2, to);                                           \
            if (hit(word, from, to, NAME) < 0) return -1;                                     \
        }                                                                                     \
        return real(__VA_ARGS__);                                                             \
    }
int rename(const char *a, const char *b) TWO("rename", rename, AT_FDCWD, a, AT_FDCWD, b, a, b)
int renameat(int d, const char *a, int e, const char *b) TWO("rename", renameat, d, a, e, b, d, a, e, b)
int renameat2(int d, const char *a, int e, const char *b, unsigned f) TWO("rename", renameat2, d, a, e, b, d, a, e, b, f)
int link(const char *a, const char *b) TWO("link", link, AT_FDCWD, a, AT_FDCWD, b, a, b)
int symlink(const char *a, const char *b) TWO("symlink", symlink, AT_FDCWD, b, AT_FDCWD, b, a, b)

#define ONE(word, name, where_at, p, needs, ...)                                              \
    {                                                                                         \
        REAL(name);                                                                           \
        if (armed) {                                                                          \
            char where[PATH_MAX];                                                             \
            full(where_at, p, where);                                                         \
            if (hit(word, where, NULL, needs) < 0) return -1;                                 \
        }                                                                                     \
        return real(__VA_ARGS__);                                                             \
    }
int mkdir(const char *p, mode_t m) ONE("mkdir", mkdir, AT_FDCWD, p, SPACE | NAME, p, m)
int mkdirat(int d, const char *p, mode_t m) ONE("mkdir", mkdirat, d, p, SPACE | NAME, d, p, m)
int unlink(const char *p) ONE("remove", unlink, AT_FDCWD, p, REMOVE, p)
int unlinkat(int d, const char *p, int f) ONE("remove", unlinkat, d, p, REMOVE, d, p, f)
int rmdir(const char *p) ONE("remove", rmdir, AT_FDCWD, p, REMOVE, p)
int chmod(const char *p, mode_t m) ONE("chmod", chmod, AT_FDCWD, p, NAME, p, m)
int fchmodat(int d, const char *p, mode_t m, int f) ONE("chmod", fchmodat, d, p, NAME, d, p, m, f)
int truncate(const char *p, off_t n) ONE("truncate", truncate, AT_FDCWD, p, SPACE, p, n)
int fsync(int fd) ONE("fsync", fsync, fd, "", SYNC, fd)
int fdatasync(int fd) ONE("fsync", fdatasync, fd, "", SYNC, fd)
int fchmod(int fd, mode_t m) ONE("chmod", fchmod, fd, "", NAME, fd, m)
int ftruncate(int fd, off_t n) ONE("write", ftruncate, fd, "", SPACE, fd, n)
int ftruncate64(int fd, off64_t n) ONE("write", ftruncate64, fd, "", SPACE, fd, n)

#define WRITE(name, half, ...)                                                                \
    {                                                                                         \
        REAL(name);                                                                           \
        if (armed && fd != log_fd) {                                                          \
            char where[PATH_MAX];                                                             \
            full(fd, "", where);                                                              \
            int verdict = hit("write", where, NULL, SPACE);                                   \
            if (verdict < 0) return -1;                                                       \
            if (verdict) {                                                                    \
                half;                                                                         \
                kill(getpid(), SIGKILL);                                                      \
            }                                                                                 \
        }                                                                                     \
        return real(__VA_ARGS__);                                                             \
    }
ssize_t write(int fd, const void *b, size_t n) WRITE(write, (void)!real(fd, b, n / 2), fd, b, n)
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) WRITE(pwrite, (void)!real(fd, b, n / 2, o), fd, b, n, o)
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) WRITE(pwrite64, (void)!real(fd, b, n / 2, o), fd, b, n, o)
ssize_t writev(int fd, const struct iovec *v, int n) WRITE(writev, (void)!real(fd, v, 1), fd, v, n)
ssize_t sendfile(int fd, int i, off_t *o, size_t n) WRITE(sendfile, (void)!real(fd, i, o, n / 2), fd, i, o, n)
ssize_t sendfile64(int fd, int i, off64_t *o, size_t n) WRITE(sendfile64, (void)!real(fd, i, o, n / 2), fd, i, o, n)
ssize_t copy_file_range(int i, off64_t *p, int fd, off64_t *o, size_t n, unsigned f)
    WRITE(copy_file_range, (void)!real(i, p, fd, o, n / 2, f), i, p, fd, o, n, f)
