/* Records what a program does to the files below one directory, in the order it does it, so that a
 * test can work out what a machine that loses power would have kept. Preloaded (LD_PRELOAD).
 *
 * FLOWRUN_POWER_DIR  the directory
 * FLOWRUN_POWER_LOG  the file to append the records to
 *
 * A record is: kind (1 byte), time (nanoseconds), file, parent, to (the inode numbers), offset, the
 * lengths of two texts, the texts. Numbers are 8 bytes, as the machine has them. Kinds:
 *   C  `file` was made under the name `text` in `parent`       W  `data` was written at `offset`
 *   D  a directory likewise                                     T  the file was cut to `offset` bytes
 *   U  the name was taken away (of a file or a directory)       S  an fsync began; `offset` numbers it
 *   R  `file` was renamed from `text` in `parent` to `data` in `to`   E  it ended well
 * What is done and its record are under one lock, so that their order is the same; an fsync alone
 * is not, since it lasts: it covers what was done before it began. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *dir;
static size_t dir_length;
static int log_fd = -1;
static uint64_t syncs;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FLOWRUN_POWER_LOG");
    dir = getenv("FLOWRUN_POWER_DIR");
    if (!dir || !path) return;
    dir_length = strlen(dir);
    log_fd = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_fd < 0) abort();
}

static int below(const char *path) {
    return log_fd >= 0 && !strncmp(path, dir, dir_length) && (path[dir_length] == '/' || !path[dir_length]);
}

/* The path of an open file; 1 where it lies below the directory. One that was deleted does not count. */
static int path_of(int fd, char out[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return below(out);
}

/* An absolute path whose last part need not be there; 1 where it lies below the directory. */
static int resolve(int at, const char *path, char out[PATH_MAX]) {
    char joined[2 * PATH_MAX], base[PATH_MAX] = "", parent[2 * PATH_MAX];
    if (log_fd < 0 || !path) return 0;
    if (path[0] != '/') {
        if (at == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
    }
    snprintf(joined, sizeof joined, "%s%s%s", base, path[0] == '/' ? "" : "/", path);
    size_t n = strlen(joined);
    while (n > 1 && joined[n - 1] == '/') joined[--n] = 0;
    char *name = strrchr(joined, '/');
    if (!name) return 0;
    snprintf(parent, sizeof parent, "%.*s", (int)(name - joined), joined);
    char whole[PATH_MAX];
    if (!realpath(parent[0] ? parent : "/", whole)) return 0;
    snprintf(out, PATH_MAX, "%.2000s/%.1000s", strcmp(whole, "/") ? whole : "", name + 1);
    return below(out);
}

static uint64_t inode(const char *path) {
    struct stat s;
    return lstat(path, &s) ? 0 : s.st_ino;
}

static uint64_t parent_of(const char *path) {
    char parent[PATH_MAX];
    snprintf(parent, sizeof parent, "%s", path);
    *strrchr(parent, '/') = 0;
    return inode(parent);
}

static void put(const void *bytes, size_t n) {
    const char *p = bytes;
    while (n) {
        ssize_t done = REAL(write)(log_fd, p, n);
        if (done < 0) abort();
        p += done;
        n -= done;
    }
}

static void record(char kind, uint64_t file, uint64_t parent, uint64_t to, uint64_t offset, const char *text,
                   const void *data, size_t length) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t head[7] = {now.tv_sec * 1000000000ull + now.tv_nsec, file, parent, to, offset, strlen(text), length};
    put(&kind, 1);
    put(head, sizeof head);
    put(text, strlen(text));
    put(data, length);
}

static const char *name_of(const char *path) { return strrchr(path, '/') + 1; }

static int opened(int at, const char *path, int flags, mode_t mode) {
    char where[PATH_MAX];
    int changes = flags & (O_CREAT | O_TRUNC);
    if (!changes || (flags & O_TMPFILE) == O_TMPFILE || !resolve(at, path, where))
        return REAL(openat)(at, path, flags, mode);
    pthread_mutex_lock(&lock);
    uint64_t before = inode(where);
    int fd = REAL(openat)(at, path, flags, mode), error = errno;
    if (fd >= 0 && !before) record('C', inode(where), parent_of(where), 0, 0, name_of(where), "", 0);
    else if (fd >= 0 && (flags & O_TRUNC)) record('T', before, 0, 0, 0, "", "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

static mode_t mode_in(int flags, va_list more) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(more, mode_t) : 0;
}

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        mode_t mode = mode_in(flags, more);                             \
        va_end(more);                                                   \
        return opened(AT_FDCWD, path, flags, mode);                     \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
    int name(int at, const char *path, int flags, ...) {                \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        mode_t mode = mode_in(flags, more);                             \
        va_end(more);                                                   \
        return opened(at, path, flags, mode);                           \
    }
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* The file of a descriptor, where it lies below the directory and has a name. */
static uint64_t watched(int fd) {
    struct stat s;
    char path[PATH_MAX];
    if (log_fd < 0 || fd == log_fd || fstat(fd, &s) || !(S_ISREG(s.st_mode) || S_ISDIR(s.st_mode))) return 0;
    return path_of(fd, path) ? s.st_ino : 0;
}

static ssize_t wrote(uint64_t file, off_t at, const struct iovec *parts, int count, ssize_t done) {
    int error = errno;
    char *data = done > 0 ? malloc(done) : NULL;
    size_t have = 0;
    for (int i = 0; data && i < count && have < (size_t)done; i++) {
        size_t n = parts[i].iov_len < done - have ? parts[i].iov_len : done - have;
        memcpy(data + have, parts[i].iov_base, n);
        have += n;
    }
    if (data) record('W', file, 0, 0, at, "", data, done);
    free(data);
    errno = error;
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    uint64_t file = watched(fd);
    if (!file) return REAL(writev)(fd, parts, count);
    pthread_mutex_lock(&lock);
    ssize_t done = REAL(writev)(fd, parts, count);
    /* Where the file is now is where the write has ended, appended or not. */
    wrote(file, lseek(fd, 0, SEEK_CUR) - done, parts, count, done);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *data, size_t n) {
    uint64_t file = watched(fd);
    if (!file) return REAL(write)(fd, data, n);
    struct iovec part = {(void *)data, n};
    pthread_mutex_lock(&lock);
    ssize_t done = REAL(write)(fd, data, n);
    wrote(file, lseek(fd, 0, SEEK_CUR) - done, &part, 1, done);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) {
    uint64_t file = watched(fd);
    if (!file) return REAL(pwrite64)(fd, data, n, at);
    struct iovec part = {(void *)data, n};
    pthread_mutex_lock(&lock);
    ssize_t done = wrote(file, at, &part, 1, REAL(pwrite64)(fd, data, n, at));
    pthread_mutex_unlock(&lock);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }

/* Copies within the kernel: refused, so that the program falls back to reading and writing. */
ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t n, unsigned flags) {
    if (!watched(out)) return REAL(copy_file_range)(in, from, out, to, n, flags);
    errno = ENOSYS;
    return -1;
}
ssize_t sendfile64(int out, int in, off_t *from, size_t n) {
    if (!watched(out)) return REAL(sendfile64)(out, in, from, n);
    errno = EINVAL;
    return -1;
}
ssize_t sendfile(int out, int in, off_t *from, size_t n) { return sendfile64(out, in, from, n); }

/* Writes through memory are not seen, so nobody may make them. */
void *mmap64(void *at, size_t n, int protection, int flags, int fd, off_t from) {
    if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED) && watched(fd)) abort();
    return REAL(mmap64)(at, n, protection, flags, fd, from);
}
void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t from) {
    return mmap64(at, n, protection, flags, fd, from);
}

int ftruncate64(int fd, off_t length) {
    uint64_t file = watched(fd);
    pthread_mutex_lock(&lock);
    int done = REAL(ftruncate64)(fd, length), error = errno;
    if (file && !done) record('T', file, 0, 0, length, "", "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

static int synced(int fd, int (*sync)(int)) {
    uint64_t file = watched(fd);
    if (!file) return sync(fd);
    pthread_mutex_lock(&lock);
    uint64_t number = syncs++;
    record('S', file, 0, 0, number, "", "", 0);
    pthread_mutex_unlock(&lock);
    int done = sync(fd), error = errno;
    pthread_mutex_lock(&lock);
    if (!done) record('E', file, 0, 0, number, "", "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

static int renamed(int from_at, const char *from, int to_at, const char *to) {
    char a[PATH_MAX], b[PATH_MAX];
    int ours = resolve(from_at, from, a), theirs = resolve(to_at, to, b);
    /* A file that comes from elsewhere has a content that was not recorded. */
    if (ours != theirs) abort();
    if (!ours) return REAL(renameat)(from_at, from, to_at, to);
    pthread_mutex_lock(&lock);
    uint64_t file = inode(a);
    int done = REAL(renameat)(from_at, from, to_at, to), error = errno;
    if (!done) record('R', file, parent_of(a), parent_of(b), 0, name_of(a), name_of(b), strlen(name_of(b)));
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int from_at, const char *from, int to_at, const char *to) { return renamed(from_at, from, to_at, to); }

static int unlinked(int at, const char *path, int flags) {
    char where[PATH_MAX];
    if (!resolve(at, path, where)) return REAL(unlinkat)(at, path, flags);
    pthread_mutex_lock(&lock);
    uint64_t file = inode(where), parent = parent_of(where);
    int done = REAL(unlinkat)(at, path, flags), error = errno;
    if (!done) record('U', file, parent, 0, 0, name_of(where), "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int unlinkat(int at, const char *path, int flags) { return unlinked(at, path, flags); }
int unlink(const char *path) { return unlinked(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinked(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    struct stat s;
    return unlinked(AT_FDCWD, path, !lstat(path, &s) && S_ISDIR(s.st_mode) ? AT_REMOVEDIR : 0);
}

int mkdirat(int at, const char *path, mode_t mode) {
    char where[PATH_MAX];
    if (!resolve(at, path, where)) return REAL(mkdirat)(at, path, mode);
    pthread_mutex_lock(&lock);
    int done = REAL(mkdirat)(at, path, mode), error = errno;
    if (!done) record('D', inode(where), parent_of(where), 0, 0, name_of(where), "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
